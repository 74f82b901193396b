#include "engine/layers/depthwise_planes.h"

#include <algorithm>
#include <map>

#include "engine/layers/patches.h"

namespace lutra {
namespace {

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Towards minus infinity; the rest is 0..by-1.
int64_t floor_div(int64_t n, int64_t by) { return n >= 0 ? n / by : -ceil_div(-n, by); }

// A stride of 2 of bytes is the kernel's.
int64_t column_planes(const ConvGeometry& g, bool bytes) {
  return bytes && g.stride_w == 2 ? 1 : g.stride_w;
}

}  // namespace

DepthwiseShape depthwise_shape(const ConvGeometry& g, int64_t outputs, bool bytes) {
  const bool together = column_planes(g, bytes) == 1;  // the columns of a line
  return {.taps = static_cast<int32_t>(g.taps()),
          .row = static_cast<int32_t>(g.kernel_w),
          .gap = together ? static_cast<int32_t>(g.dilation_w) : 0,
          .step = together ? static_cast<int32_t>(g.stride_w) : 1,
          .multiplier = static_cast<int32_t>(outputs / g.channels)};
}

DepthwisePlanes::DepthwisePlanes(const Kernels& kernels, const ConvGeometry& g,
                                 const DepthwiseShape& shape, int64_t h, int64_t w, bool bytes)
    : height(h), width(w), outputs(g.out_h(h) * g.out_w(w)), g_(g) {
  columns_ = column_planes(g, bytes);
  pitch_ = std::max(ceil_div(w, columns_), shape.step * g.out_w(w));
  const int64_t lines = ceil_div(h, g.stride_h);
  for (int64_t a = 0; a < std::min(g.stride_h, h); ++a) {
    lines_.push_back(ceil_div(h - a, g.stride_h));
  }
  whole_ = columns_ == 1 && g.stride_h == 1 && pitch_ == w;
  // Of the taps, with the first output: line and column of the plane they are in.
  std::vector<int64_t> part, place;
  int64_t least = 0, most = 0;
  for (int64_t ky = 0; ky < g.kernel_h; ++ky) {
    const int64_t y = ky * g.dilation_h - g.pad_h;
    for (int64_t kx = 0; kx < g.kernel_w; ++kx) {
      const int64_t x = kx * g.dilation_w - g.pad_w;
      const int64_t line = floor_div(y, g.stride_h), column = floor_div(x, columns_);
      part.push_back((y - line * g.stride_h) * columns_ + x - column * columns_);
      place.push_back(line * pitch_ + column);
      least = std::min(least, place.back());
      most = std::max(most, place.back());
    }
  }
  constexpr int64_t kAlign = 64;
  const int64_t reach = (g.out_h(h) - 1) * pitch_ + (g.out_w(w) + kMaxRowTile) * shape.step;
  before_ = ceil_div(-least, kAlign) * kAlign;
  part_ = before_ + ceil_div(std::max(lines * pitch_, most + reach) + 64, kAlign) * kAlign;
  plane = part_ * g.stride_h * columns_;
  least_ = -least;
  most_ = most + reach + 64;
  for (size_t t = 0; t < place.size(); ++t) {
    offset.push_back(static_cast<int32_t>(part[t] * part_ + before_ + place[t]));
  }
  find_tiles(kernels, shape, bytes);
}

void DepthwisePlanes::find_tiles(const Kernels& kernels, const DepthwiseShape& shape, bool bytes) {
  const int64_t out_w = g_.out_w(width);
  const int64_t tile = kernels.row_tile;
  const bool one_line = pitch_ == shape.step * out_w;
  const int64_t line = one_line ? outputs : out_w;  // rows that tiles do not go beyond
  std::map<std::vector<uint64_t>, size_t> sets;
  std::vector<uint64_t> valid(static_cast<size_t>(g_.taps()));
  for (int64_t start = 0; start < outputs; start += line) {
    for (int64_t first = start; first < start + line; first += tile) {
      const int64_t count = std::min(tile, start + line - first);
      std::fill(valid.begin(), valid.end(), 0);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t y = (first + r) / out_w * g_.stride_h - g_.pad_h;
        const int64_t x = (first + r) % out_w * g_.stride_w - g_.pad_w;
        for (int64_t t = 0; t < g_.taps(); ++t) {
          const int64_t ty = y + t / g_.kernel_w * g_.dilation_h;
          const int64_t tx = x + t % g_.kernel_w * g_.dilation_w;
          const bool in = ty >= 0 && ty < height && tx >= 0 && tx < width;
          valid[static_cast<size_t>(t)] |= static_cast<uint64_t>(in) << r;
        }
      }
      const size_t set = sets.emplace(valid, sets.size()).first->second;
      const int64_t at = first / out_w * pitch_ + first % out_w * shape.step;
      tiles.push_back({first, count, at, set});
    }
  }
  mask_bytes_ = bytes ? kernels.depthwise8_mask_bytes(shape) : valid.size() * sizeof(uint64_t);
  mask_bytes_ = align64(mask_bytes_);
  masks_ = AlignedBytes(sets.size() * mask_bytes_);
  for (const auto& [masks, set] : sets) {
    uint8_t* const to = masks_.data() + set * mask_bytes_;
    if (bytes) {
      kernels.pack_depthwise8_masks(shape, masks.data(), to);
    } else {
      std::memcpy(to, masks.data(), masks.size() * sizeof(uint64_t));
    }
  }
}

template <class T>
void DepthwisePlanes::copy(const T* x, T* to) const {
  if (whole_) return copy_lines(to + before_, 0, x, 0, 1, height * width);
  for (size_t a = 0; a < lines_.size(); ++a) {
    T* const part = to + static_cast<int64_t>(a) * columns_ * part_ + before_;
    const int64_t step = g_.stride_h * width;
    const T* from = x + static_cast<int64_t>(a) * width;
    if (columns_ == 1) {
      copy_lines(part, pitch_, from, step, lines_[a], width);
    } else if (columns_ == 2) {
      for (int64_t y = 0; y < lines_[a]; ++y, from += step) {
        split_pairs(from, width, part + y * pitch_, part + y * pitch_ + part_);
      }
    } else {
      for (int64_t y = 0; y < lines_[a]; ++y, from += step) {
        for (int64_t c = 0; c < width; ++c) {
          part[c % columns_ * part_ + y * pitch_ + c / columns_] = from[c];
        }
      }
    }
  }
}

template void DepthwisePlanes::copy(const uint8_t*, uint8_t*) const;
template void DepthwisePlanes::copy(const float*, float*) const;

std::shared_ptr<const DepthwisePlanes> DepthwiseCache::find(int64_t h, int64_t w) const {
  const std::lock_guard lock(mutex_);
  for (size_t i = kept_.size(); i-- > 0;) {
    if (kept_[i]->height == h && kept_[i]->width == w) {
      std::rotate(kept_.begin() + static_cast<int64_t>(i),
                  kept_.begin() + static_cast<int64_t>(i) + 1, kept_.end());
      return kept_.back();
    }
  }
  if (kept_.size() == kKept) kept_.erase(kept_.begin());
  kept_.push_back(std::make_shared<DepthwisePlanes>(kernels_, g_, shape, h, w, bytes_));
  return kept_.back();
}

}  // namespace lutra
