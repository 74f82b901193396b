#include "engine/layers/patch_source.h"

#include "engine/core/memory.h"

namespace lutra {
namespace {

constexpr int64_t kFillChannels = 32;  // channels converted by one work item
constexpr int64_t kFillRows = 64;      // rows of channels transposed by one work item

// Rough speeds of one core, to guess how long a job takes.
constexpr double kQuantizedPerMicrosecond = 2e3;
constexpr double kCopiedPerMicrosecond = 2e4;

// Rows of channels -> planes of rows, in blocks. convert(const S*, count, uint8_t*)
template <class S, class Convert>
void transpose(const View<S>& x, int64_t step, uint8_t* to, uint8_t* scratch, size_t stride,
               double microseconds, ThreadPool& pool, const Convert& convert) {
  const int64_t rows = x.pixels();
  const int64_t blocks = (x.c + kFillChannels - 1) / kFillChannels;
  const int64_t row_blocks = (rows + kFillRows - 1) / kFillRows;
  pool.run(static_cast<size_t>(row_blocks * blocks), microseconds, [&](size_t item, int worker) {
    const int64_t row = static_cast<int64_t>(item) / blocks * kFillRows;
    const int64_t channel = static_cast<int64_t>(item) % blocks * kFillChannels;
    const int64_t count = std::min(kFillRows, rows - row);
    const int64_t channels = std::min(kFillChannels, x.c - channel);
    uint8_t* const block = scratch + static_cast<size_t>(worker) * stride;
    for (int64_t r = 0; r < count; ++r) {
      convert(x.data + (row + r) * step + channel, channels, block + r * channels);
    }
    for (int64_t c = 0; c < channels; ++c) {
      uint8_t* const plane = to + (channel + c) * rows + row;
      for (int64_t r = 0; r < count; ++r) plane[r] = block[r * channels + c];
    }
  });
}

// `bytes` bytes of copies of a unit of one byte or four.
void fill(uint8_t* to, const uint8_t* unit, int64_t size, int64_t bytes) {
  if (size == 1) {
    std::memset(to, *unit, static_cast<size_t>(bytes));
    return;
  }
  for (int64_t i = 0; i < bytes; i += size) std::memcpy(to + i, unit, 4);
}

}  // namespace

PatchSource::PatchSource(const ConvGeometry& g, int64_t n, int64_t h, int64_t w, int64_t unit)
    : g_(g), n_(n), h_(h), w_(w), unit_(unit), planes_(g, n, h, w) {}

size_t PatchSource::bytes() const {
  return align64(static_cast<size_t>(g_.taps()) * sizeof(int32_t)) +
         align64(static_cast<size_t>(planes_.elements() * unit_));
}

size_t PatchSource::scratch_bytes() const {
  return align64(static_cast<size_t>(std::max(w_, kFillRows) * kFillChannels));
}

uint8_t* PatchSource::begin(uint8_t* workspace) {
  taps_ = reinterpret_cast<int32_t*>(workspace);
  planes_.write_tap_offsets(taps_);
  for (int64_t t = 0; unit_ > 1 && t < g_.taps(); ++t) taps_[t] *= static_cast<int32_t>(unit_);
  plane_ = planes_.plane() * unit_;
  consecutive_ = planes_.plain();
  uint8_t* const planes = workspace + align64(static_cast<size_t>(g_.taps()) * sizeof(int32_t));
  data_ = planes;
  return planes;
}

bool PatchSource::take(const ByteView& x) {
  if (!planes_.plain() || x.row_step() != 1) return false;
  data_ = x.data;
  plane_ = x.sc;
  return true;
}

void PatchSource::load(const ByteView& x, int32_t zero, uint8_t* workspace, uint8_t* scratch,
                       size_t stride, ThreadPool& pool) {
  uint8_t* const to = begin(workspace);
  const int64_t step = planes_.plain() ? x.row_step() : 0;
  if (take(x)) return;
  if (g_.taps() == 1 && !g_.padded() && x.sw == 1) return subsample(x, to, pool);
  if (step != 0 && x.sc == 1) {
    const double time = static_cast<double>(x.pixels() * x.c) / kCopiedPerMicrosecond;
    transpose(x, step, to, scratch, stride, time, pool,
              [](const uint8_t* from, int64_t count, uint8_t* target) {
                copy_lines(target, 0, from, 0, 1, count);
              });
    return;
  }
  copy_planes(x, to, pool, [zero](int64_t) { return static_cast<uint8_t>(zero); });
}

template <class T>
void PatchSource::load(const View<const T>& x, const uint8_t* padding, uint8_t* workspace,
                       ThreadPool& pool) {
  copy_planes(x, reinterpret_cast<T*>(begin(workspace)), pool, [padding](int64_t c) {
    T element;
    std::memcpy(&element, padding + c * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return element;
  });
}
template void PatchSource::load(const ByteView&, const uint8_t*, uint8_t*, ThreadPool&);
template void PatchSource::load(const View<const uint32_t>&, const uint8_t*, uint8_t*, ThreadPool&);

template <class T, class PaddingOf>
void PatchSource::copy_planes(const View<const T>& x, T* to, ThreadPool& pool,
                              const PaddingOf& padding_of) {
  const PaddedPlanes<T> planes(g_, n_, h_, w_);
  const double time = static_cast<double>(x.pixels() * x.c) / kCopiedPerMicrosecond;
  const int64_t items = (x.c + kFillChannels - 1) / kFillChannels;
  pool.run(static_cast<size_t>(items), time, [&](size_t item, int) {
    const int64_t first = static_cast<int64_t>(item) * kFillChannels;
    const int64_t last = std::min(x.c, first + kFillChannels);
    for (int64_t c = first; c < last; ++c) {
      const T padding = padding_of(c);
      for (int64_t n = 0; n < x.n; ++n) {
        planes.pad_and_copy(to, x.data + c * x.sc + n * x.sn, n, c, padding);
      }
    }
  });
}

PatchSource::Pixels PatchSource::open(const uint8_t* padding, uint8_t* workspace) {
  uint8_t* const to = begin(workspace);
  const int64_t above = planes_.above() * unit_, below = planes_.below() * unit_;
  const int64_t pixels = h_ * w_ * unit_, image = above + pixels + below;
  for (int64_t c = 0; c < g_.channels; ++c, padding += unit_) {
    for (int64_t n = 0; n < n_; ++n) {
      uint8_t* const at = to + c * plane_ + n * image;
      fill(at, padding, unit_, above);
      fill(at + above + pixels, padding, unit_, below);
    }
  }
  return {to + above, plane_, image};
}

size_t PatchSource::quad_scratch_bytes() const {
  return g_.stride_w == 1 ? 0 : align64(static_cast<size_t>(h_ * w_) * sizeof(uint32_t));
}

void PatchSource::load_quads(const uint8_t* x, int64_t plane, int64_t channels, uint8_t zero,
                             uint8_t* workspace, uint8_t* scratch, size_t stride,
                             ThreadPool& pool) {
  uint32_t* const to = reinterpret_cast<uint32_t*>(begin(workspace));
  const PaddedPlanes<uint32_t> planes(g_, n_, h_, w_);
  const double time = static_cast<double>(n_ * h_ * w_ * channels) / kCopiedPerMicrosecond;
  pool.run(static_cast<size_t>(g_.channels), time, [&](size_t item, int worker) {
    const int64_t c = static_cast<int64_t>(item);
    planes.clear(to, c, c + 1, zero * 0x01010101u);
    const uint8_t* line[4];
    for (int64_t n = 0; n < n_; ++n) {
      for (int64_t j = 0; j < 4; ++j) {
        line[j] = x + std::min(4 * c + j, channels - 1) * plane + n * h_ * w_;
      }
      if (g_.stride_w != 1) {
        uint32_t* const image =
            reinterpret_cast<uint32_t*>(scratch + static_cast<size_t>(worker) * stride);
        interleave_quads(line, h_ * w_, image);
        planes.copy(to, image, n, c);
        continue;
      }
      uint32_t* at = planes.lines(to, n, c) + g_.pad_w;
      for (int64_t y = 0; y < h_; ++y, at += planes.pitch()) {
        interleave_quads(line, w_, at);
        for (const uint8_t*& from : line) from += w_;
      }
    }
  });
}

// A 1x1 convolution with a stride: its rows become consecutive.
void PatchSource::subsample(const ByteView& x, uint8_t* to, ThreadPool& pool) {
  const int64_t height = g_.out_h(h_), width = g_.out_w(w_);
  consecutive_ = true;
  plane_ = planes_.rows();
  pool.run(static_cast<size_t>(x.c), static_cast<double>(x.pixels() * x.c) / kCopiedPerMicrosecond,
           [&](size_t c, int) {
             uint8_t* line = to + static_cast<int64_t>(c) * plane_;
             for (int64_t n = 0; n < x.n; ++n) {
               for (int64_t y = 0; y < height; ++y, line += width) {
                 const uint8_t* const from =
                     x.data + static_cast<int64_t>(c) * x.sc + n * x.sn + y * g_.stride_h * x.sh;
                 if (g_.stride_w == 2) {
                   split_pairs<uint8_t>(from, 2 * width - 1, line, nullptr);
                 } else {
                   for (int64_t i = 0; i < width; ++i) line[i] = from[i * g_.stride_w];
                 }
               }
             }
           });
}

void PatchSource::load(const ImageView& x, const Kernels& kernels, const Grid& grid,
                       uint8_t* workspace, uint8_t* scratch, size_t stride, ThreadPool& pool) {
  uint8_t* const to = begin(workspace);
  auto convert = [&](const float* from, int64_t count, uint8_t* target) {
    kernels.quantize(from, static_cast<size_t>(count), grid, target);
  };
  const int64_t blocks = (x.c + kFillChannels - 1) / kFillChannels, rows = x.pixels();
  const double time = static_cast<double>(rows * x.c) / kQuantizedPerMicrosecond;
  const int64_t step = planes_.plain() ? x.row_step() : 0;
  if (step != 0 && x.sc == 1) {
    transpose(x, step, to, scratch, stride, time, pool, convert);
    return;
  }
  if (step == 1) {
    pool.run(static_cast<size_t>(x.c), time, [&](size_t c, int) {
      convert(x.data + static_cast<int64_t>(c) * x.sc, rows, to + static_cast<int64_t>(c) * rows);
    });
    return;
  }
  pool.run(static_cast<size_t>(x.n * blocks), time, [&](size_t item, int worker) {
    const int64_t n = static_cast<int64_t>(item) / blocks;
    const int64_t first = static_cast<int64_t>(item) % blocks * kFillChannels;
    const int64_t last = std::min(x.c, first + kFillChannels);
    planes_.fill(to, x, n, first, last, static_cast<uint8_t>(grid.zero),
                 scratch + static_cast<size_t>(worker) * stride, convert);
  });
}

Patch PatchSource::tile(int64_t first, int64_t count, int32_t row_tile, int32_t* row) const {
  if (consecutive_) {
    for (int32_t r = 0; r < row_tile; ++r) {
      row[r] = std::min(r, static_cast<int32_t>(count) - 1);
    }
    return {data_ + first, plane_, taps_, row, static_cast<int32_t>(count), true};
  }
  const auto runs = planes_.runs(first, count);
  int32_t at = 0;
  for (int64_t i = 0; i < runs.count; ++i) {
    const int32_t unit = static_cast<int32_t>(unit_);
    const int32_t offset = static_cast<int32_t>(runs.source[i] - runs.source[0]) * unit;
    for (int32_t k = 0; k < runs.length[i]; ++k) row[at++] = offset + k * unit;
  }
  for (const int32_t last = row[at - 1]; at < row_tile; ++at) row[at] = last;
  return {data_ + runs.source[0] * unit_, plane_, taps_, row, static_cast<int32_t>(count),
          runs.count == 1 && unit_ == 1};
}

const uint8_t* PatchSource::blocks(int64_t first, int64_t count, int32_t* block) const {
  const auto runs = planes_.runs(first, count);
  int64_t b = 0;
  for (int64_t i = 0; i < runs.count; ++i) {
    if (i + 1 < runs.count && runs.length[i] % kRowBlock != 0) return nullptr;
    for (int64_t k = 0; k < runs.length[i]; k += kRowBlock) {
      block[b++] = static_cast<int32_t>((runs.source[i] - runs.source[0] + k) * unit_);
    }
  }
  return data_ + runs.source[0] * unit_;
}

void PatchSource::entry_offsets(int64_t count, int64_t* offset) const {
  const int64_t taps = g_.taps();
  for (int64_t first = 0, plane = 0; first < count; first += taps, plane += plane_) {
    const int64_t some = std::min(taps, count - first);
    for (int64_t t = 0; t < some; ++t) offset[first + t] = plane + taps_[t];
  }
}

}  // namespace lutra
