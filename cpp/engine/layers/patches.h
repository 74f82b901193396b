// From images to the rows of a tile, without an im2col matrix of the whole image.
//
// The input is first copied into padded planes, once. The address of a value of a patch is then the
// sum of an offset of its entry (channel, kernel row, kernel column) and an offset of its row (the
// output pixel). With a horizontal stride s the columns of a padded line are stored phase by phase
// (x = 0, s, 2s, ... then 1, s + 1, ...), so that neighbouring output pixels always read
// neighbouring addresses.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "engine/layers/conv_geometry.h"
#include "kernels/kernels.h"

#ifdef __SSE2__  // part of every x86-64
#include <emmintrin.h>
#endif

namespace lutra {

// An image batch anywhere in memory; strides in elements.
template <class T>
struct View {
  T* data;
  int64_t n, c, h, w;      // sizes
  int64_t sn, sc, sh, sw;  // strides

  int64_t pixels() const { return n * h * w; }
  // The distance between neighbouring rows (pixels of all images) in memory; 0 where it is not the
  // same for all.
  int64_t row_step() const {
    const int64_t sizes[] = {w, h, n}, strides[] = {sw, sh, sn};
    int64_t step = 1, rows = 1;
    for (int i = 0; i < 3; ++i) {
      if (sizes[i] == 1) continue;
      if (rows == 1) step = strides[i];
      if (strides[i] != step * rows) return 0;
      rows *= sizes[i];
    }
    return step;
  }
};
using ImageView = View<float>;
using ByteView = View<const uint8_t>;

// Copies `lines` lines of `count` elements in chunks of kChunk, count >= kChunk; no element beyond
// a line is touched. Inlined, with constant sizes: lines of images are short.
template <int64_t kChunk, class T>
inline void copy_chunks(T* to, int64_t to_pitch, const T* from, int64_t from_pitch, int64_t lines,
                        int64_t count) {
  const int64_t whole = count / kChunk * kChunk;
  for (int64_t y = 0; y < lines; ++y, to += to_pitch, from += from_pitch) {
    for (int64_t i = 0; i < whole; i += kChunk) std::memcpy(to + i, from + i, kChunk * sizeof(T));
    if (whole != count) {
      std::memcpy(to + count - kChunk, from + count - kChunk, kChunk * sizeof(T));
    }
  }
}

template <class T>
inline void copy_lines(T* to, int64_t to_pitch, const T* from, int64_t from_pitch, int64_t lines,
                       int64_t count) {
  constexpr int64_t kChunk = 16 / sizeof(T);
  if (count >= kChunk) {
    copy_chunks<kChunk>(to, to_pitch, from, from_pitch, lines, count);
  } else if (count >= kChunk / 2) {
    copy_chunks<kChunk / 2>(to, to_pitch, from, from_pitch, lines, count);
  } else if (count >= kChunk / 4) {
    copy_chunks<kChunk / 4>(to, to_pitch, from, from_pitch, lines, count);
  } else {
    copy_chunks<1>(to, to_pitch, from, from_pitch, lines, count);
  }
}

// even[i] = from[2 i], odd[i] = from[2 i + 1]; one more even value if count is odd. `odd` may be
// null.
template <class T>
inline void split_pairs(const T* from, int64_t count, T* even, T* odd) {
  const int64_t pairs = count / 2;
  int64_t i = 0;
#ifdef __SSE2__
  if constexpr (sizeof(T) == 1) {
    const __m128i low = _mm_set1_epi16(255);
    for (; i + 16 <= pairs; i += 16) {
      const __m128i* p = reinterpret_cast<const __m128i*>(from + 2 * i);
      const __m128i a = _mm_loadu_si128(p), b = _mm_loadu_si128(p + 1);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(even + i),
                       _mm_packus_epi16(_mm_and_si128(a, low), _mm_and_si128(b, low)));
      if (!odd) continue;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(odd + i),
                       _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
    }
    for (; i + 8 <= pairs; i += 8) {
      const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i));
      const __m128i e = _mm_and_si128(a, low), o = _mm_srli_epi16(a, 8);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(even + i), _mm_packus_epi16(e, e));
      if (odd) _mm_storel_epi64(reinterpret_cast<__m128i*>(odd + i), _mm_packus_epi16(o, o));
    }
  }
#endif
  for (; i < pairs; ++i) {
    even[i] = from[2 * i];
    if (odd) odd[i] = from[2 * i + 1];
  }
  if (count % 2) even[pairs] = from[2 * pairs];
}

// to[i] = x[0][i], x[1][i], x[2][i], x[3][i], as four neighbouring bytes
inline void interleave_quads(const uint8_t* const* x, int64_t count, uint32_t* to) {
  int64_t i = 0;
#ifdef __SSE2__
  const auto load = [&i](const uint8_t* line) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(line + i));
  };
  for (; i + 8 <= count; i += 8) {
    const __m128i a = load(x[0]), b = load(x[1]), c = load(x[2]), d = load(x[3]);
    const __m128i ab = _mm_unpacklo_epi8(a, b), cd = _mm_unpacklo_epi8(c, d);
    __m128i* const out = reinterpret_cast<__m128i*>(to + i);
    _mm_storeu_si128(out, _mm_unpacklo_epi16(ab, cd));
    _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(ab, cd));
  }
#endif
  for (; i < count; ++i) {
    const uint8_t quad[4] = {x[0][i], x[1][i], x[2][i], x[3][i]};
    std::memcpy(to + i, quad, sizeof quad);
  }
}

template <class T>
class PaddedPlanes {
 public:
  static constexpr int64_t kChunk = 16 / sizeof(T);  // gather() copies 16 bytes at a time

  PaddedPlanes(const ConvGeometry& g, int64_t n, int64_t h, int64_t w)
      : g_(g),
        n_(n),
        h_(h),
        w_(w),
        phase_((w + g.pad_w + g.end_w + g.stride_w - 1) / g.stride_w),
        pitch_(phase_ * g.stride_w),
        image_((h + g.pad_h + g.end_h) * pitch_),
        plane_(plain() ? n * image_ : apart(n * image_)),
        out_h_(g.out_h(h)),
        out_w_(g.out_w(w)) {}

  int64_t elements() const { return g_.channels * plane_ + static_cast<int64_t>(kSlack); }
  int64_t rows() const { return n_ * out_h_ * out_w_; }
  int64_t plane() const { return plane_; }  // elements between channels

  // 1x1, no stride, no padding: a plane is the channel as it is, of all images on end.
  bool plain() const {
    return g_.taps() == 1 && g_.stride_h == 1 && g_.stride_w == 1 && !g_.padded();
  }

  // Whether the lines of an image follow each other without a gap, and how many elements of
  // padding are before and behind them.
  bool gapless() const { return g_.stride_w == 1 && pitch_ == w_; }
  int64_t above() const { return g_.pad_h * pitch_; }
  int64_t below() const { return g_.end_h * pitch_; }

  // Offset of each kernel position in a plane: taps() numbers.
  void write_tap_offsets(int32_t* to) const {
    for (int64_t ky = 0; ky < g_.kernel_h; ++ky) {
      for (int64_t kx = 0; kx < g_.kernel_w; ++kx) {
        *to++ = static_cast<int32_t>(tap_offset(ky, kx));
      }
    }
  }

  // Fills the planes of channels first..last-1 of image n. convert(const S*, count, T*) turns
  // consecutive values into T; scratch holds (last - first) * w elements.
  template <class S, class Convert>
  void fill(T* planes, const View<S>& x, int64_t n, int64_t first, int64_t last, T padding,
            T* scratch, const Convert& convert) const {
    for (int64_t c = first; c < last; ++c) {
      pad(planes + c * plane_ + n * image_, padding);
    }
    const int64_t channels = last - first;
    if (x.sw == 1 && x.sh == w_ && pitch_ == w_ && g_.stride_w == 1) {  // lines follow each other
      T* const to = planes + n * image_ + g_.pad_h * pitch_;
      for (int64_t c = first; c < last; ++c) {
        convert(x.data + n * x.sn + c * x.sc, h_ * w_, to + c * plane_);
      }
      return;
    }
    for (int64_t y = 0; y < h_; ++y) {
      const S* from = x.data + n * x.sn + y * x.sh + first * x.sc;
      T* to = planes + first * plane_ + n * image_ + (y + g_.pad_h) * pitch_;
      if (x.sc == 1 && x.sw != 1) {  // channels last: convert pixel by pixel, then spread
        for (int64_t i = 0; i < w_; ++i) {
          if (x.sw != channels) convert(from + i * x.sw, channels, scratch + i * channels);
        }
        if (x.sw == channels) convert(from, w_ * channels, scratch);
        for (int64_t c = 0; c < channels; ++c) {
          spread(scratch + c, channels, to + c * plane_);
        }
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) {
        const S* line = from + c * x.sc;
        if (x.sw == 1 && g_.stride_w == 1) {
          convert(line, w_, to + c * plane_ + g_.pad_w);
        } else if (x.sw == 1) {
          convert(line, w_, scratch);
          spread(scratch, 1, to + c * plane_);
        } else {
          for (int64_t i = 0; i < w_; ++i) convert(line + i * x.sw, 1, scratch + i);
          spread(scratch, 1, to + c * plane_);
        }
      }
    }
  }

  // The same for a channel whose lines are consecutive already: clear() channels, then copy() each
  // of their images.
  void clear(T* planes, int64_t first, int64_t last, T padding) const {
    if (image_ == h_ * w_) return;  // nothing but pixels
    std::fill(planes + first * plane_, planes + last * plane_, padding);
  }
  void copy(T* planes, const T* x, int64_t n, int64_t c) const {
    T* const line = lines(planes, n, c);
    if (g_.stride_w == 1) {
      copy_lines(line + g_.pad_w, pitch_, x, w_, h_, w_);
      return;
    }
    for (int64_t y = 0; y < h_; ++y) {
      if (g_.stride_w == 2) {
        T* const row = line + y * pitch_;
        split_pairs(x + y * w_, w_, row + g_.pad_w % 2 * phase_ + g_.pad_w / 2,
                    row + (g_.pad_w + 1) % 2 * phase_ + (g_.pad_w + 1) / 2);
      } else {
        spread(x + y * w_, 1, line + y * pitch_);
      }
    }
  }

  // Both at once for an image, which writes nothing twice.
  void pad_and_copy(T* planes, const T* x, int64_t n, int64_t c, T padding) const {
    T* const image = planes + c * plane_ + n * image_;
    if (g_.stride_w != 1) {
      std::fill(image, image + image_, padding);
      return copy(planes, x, n, c);
    }
    std::fill(image, image + above(), padding);
    std::fill(image + image_ - below(), image + image_, padding);
    switch (w_ * static_cast<int64_t>(sizeof(T))) {  // lines of constant size take no loop
      case 8:
        return pad_lines<8>(image + above(), x, padding);
      case 16:
        return pad_lines<16>(image + above(), x, padding);
      case 32:
        return pad_lines<32>(image + above(), x, padding);
      case 64:
        return pad_lines<64>(image + above(), x, padding);
      default:
        return pad_lines<0>(image + above(), x, padding);
    }
  }

  // The first line of a channel of an image, from its padding on.
  T* lines(T* planes, int64_t n, int64_t c) const {
    return planes + c * plane_ + n * image_ + g_.pad_h * pitch_;
  }
  int64_t pitch() const { return pitch_; }  // elements between lines

  // Where the rows first..first+count-1 of a tile come from: runs of consecutive addresses.
  struct Runs {
    int64_t count = 0;
    int64_t source[kMaxRowTile];
    int32_t target[kMaxRowTile], length[kMaxRowTile];
  };

  Runs runs(int64_t first, int64_t count) const {
    Runs r;
    int64_t x = first % out_w_, y = (first / out_w_) % out_h_, n = first / (out_w_ * out_h_);
    for (int64_t done = 0; done < count;) {
      const int64_t length = out_w_ - x < count - done ? out_w_ - x : count - done;
      const int64_t source = n * image_ + y * g_.stride_h * pitch_ + x;
      const int64_t i = r.count - 1;
      if (i >= 0 && r.source[i] + r.length[i] == source) {
        r.length[i] += static_cast<int32_t>(length);
      } else {
        r.source[r.count] = source;
        r.target[r.count] = static_cast<int32_t>(done);
        r.length[r.count++] = static_cast<int32_t>(length);
      }
      done += length;
      x = 0;
      if (++y == out_h_) {
        y = 0;
        ++n;
      }
    }
    return r;
  }

  // patch[d - first][row] for entries first..last-1; may write kSlack bytes past the end.
  void gather(const T* planes, const Runs& r, int64_t first, int64_t last, int64_t row_tile,
              T* patch) const {
    int64_t c = first / g_.taps();
    int64_t ky = first % g_.taps() / g_.kernel_w, kx = first % g_.kernel_w;
    for (int64_t d = first; d < last; ++d, patch += row_tile) {
      const T* const base = planes + c * plane_ + tap_offset(ky, kx);
      for (int64_t i = 0; i < r.count; ++i) {
        const T* const from = base + r.source[i];
        T* const to = patch + r.target[i];
        const int64_t length = r.length[i];
        for (int64_t k = 0; k < length; k += kChunk) std::memcpy(to + k, from + k, 16);
      }
      if (++kx == g_.kernel_w) {
        kx = 0;
        if (++ky == g_.kernel_h) {
          ky = 0;
          ++c;
        }
      }
    }
  }

 private:
  // Lookups read a line of every plane for each output, and again for the next ones. Planes of
  // codes an even number of cache lines apart, as those of large batches are, would share half of
  // the sets of the nearest cache or fewer. In elements, whatever their size: planes of bytes tell
  // where units of four bytes are.
  static int64_t apart(int64_t elements) {
    constexpr int64_t kLine = 64;
    return elements % (2 * kLine) == 0 ? elements + kLine : elements;
  }

  // Lines of kBytes bytes, or of any size if that is 0.
  template <size_t kBytes>
  void pad_lines(T* line, const T* x, T padding) const {
    const int64_t width = w_, pitch = pitch_, left = g_.pad_w, right = g_.end_w;
    const bool short_ends = left <= 1 && right <= 1;  // for which a call is too much
    for (int64_t y = 0; y < h_; ++y, line += pitch, x += width) {
      T* const end = line + left + width;
      if (short_ends) {
        if (left) *line = padding;
        if (right) *end = padding;
      } else {
        std::fill(line, line + left, padding);
        std::fill(end, end + right, padding);
      }
      if constexpr (kBytes > 0) {
        std::memcpy(line + left, x, kBytes);
      } else {
        copy_lines(line + left, 0, x, 0, 1, width);
      }
    }
  }

  int64_t tap_offset(int64_t ky, int64_t kx) const {
    const int64_t dx = kx * g_.dilation_w;
    const int64_t column = g_.stride_w == 1 ? dx : dx % g_.stride_w * phase_ + dx / g_.stride_w;
    return ky * g_.dilation_h * pitch_ + column;
  }

  // The border of an image, or all of it where the columns are not in order.
  void pad(T* image, T padding) const {
    if (g_.stride_w != 1) {
      if (g_.padded() || pitch_ != w_) std::fill(image, image + image_, padding);
      return;
    }
    std::fill(image, image + g_.pad_h * pitch_, padding);
    std::fill(image + image_ - g_.end_h * pitch_, image + image_, padding);
    if (pitch_ == w_) return;
    T* line = image + g_.pad_h * pitch_;
    for (int64_t y = 0; y < h_; ++y, line += pitch_) {
      std::fill(line, line + g_.pad_w, padding);
      std::fill(line + pitch_ - g_.end_w, line + pitch_, padding);
    }
  }

  void spread(const T* from, int64_t step, T* row) const {
    const int64_t width = w_, stride = g_.stride_w, first = g_.pad_w;  // T may alias members
    if (stride == 1) {
      for (int64_t i = 0; i < width; ++i) row[first + i] = from[i * step];
      return;
    }
    const int64_t phase_size = phase_;
    int64_t phase = first % stride, column = first / stride;
    for (int64_t i = 0; i < width; ++i) {
      row[phase * phase_size + column] = from[i * step];
      if (++phase == stride) {
        phase = 0;
        ++column;
      }
    }
  }

  ConvGeometry g_;
  int64_t n_, h_, w_;
  int64_t phase_, pitch_, image_, plane_;  // elements
  int64_t out_h_, out_w_;
};

}  // namespace lutra
