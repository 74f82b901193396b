// Low-bit weights. Private to avx2.cc; lowbit.h has the order of packed weights, and
// lowbit_tables.h the kernel of tables, which is written in the words at the end of this file.
#pragma once

#include "avx2_common.h"
#include "lowbit.h"

namespace lutra {
namespace {

// The first `count` of 8 dwords.
LUTRA_INLINE __m256i first_dwords(int32_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

float lowbit_quantize(const float* x, size_t n, int8_t* q) {
  // Magnitudes as integers: infinities and NaN are above all numbers.
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256();
  for (size_t i = 0; i < n; i += 8) {
    const __m256i mask = first_dwords(n - i < 8 ? static_cast<int32_t>(n - i) : 8);
    const __m256i v = _mm256_castps_si256(_mm256_maskload_ps(x + i, mask));
    most = _mm256_max_epi32(most, _mm256_and_si256(v, magnitude));
  }
  int32_t lanes[8], top_bits = 0;
  store(lanes, most);
  for (int32_t i = 0; i < 8; ++i) top_bits = lanes[i] > top_bits ? lanes[i] : top_bits;
  if (top_bits >= kInfinityBits) return no_row(n, q);
  const float top = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(top_bits)));
  const bool zero = top < 0x1p-120f;
  const __m256 inverse = _mm256_set1_ps(zero ? 0.0f : 127.0f / top);
  for (size_t i = 0; i < n; i += 8) {
    const int32_t left = n - i < 8 ? static_cast<int32_t>(n - i) : 8;
    const __m256 v = _mm256_mul_ps(_mm256_maskload_ps(x + i, first_dwords(left)), inverse);
    const __m256i dwords = _mm256_cvtps_epi32(v);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(dwords), _mm256_extracti128_si256(dwords, 1));
    const __m128i bytes = _mm_packs_epi16(words, words);
    if (left == 8) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(q + i), bytes);
    } else {
      int8_t tail[16];
      store_half(tail, bytes);
      for (int32_t j = 0; j < left; ++j) q[i + j] = tail[j];
    }
  }
  return zero ? 0.0f : top / 127.0f;
}

// Asks for weights that are read some blocks later: where they come from beyond the second-level
// cache, the hardware alone asks too late for few rows, which read 64 bytes in ten cycles. Any
// address will do.
LUTRA_INLINE void fetch_ahead(const uint8_t* weights) {
  _mm_prefetch(reinterpret_cast<const char*>(weights) + 1024, _MM_HINT_T0);
}

// As keep(), and in the order of the program: activations are not loaded so far ahead that sums do
// not stay in registers.
LUTRA_INLINE void keep_order(__m256i& v) { __asm__ volatile("" : "+x"(v)); }

// --- the dense kernel ---------------------------------------------------------------------------
//
// 16 outputs x kRowsAtOnce (at most 4) rows: two registers of 16-bit sums for each row, two lanes
// for each output. A block of 64 bytes becomes, field after field, two registers of four
// neighbouring weights of 8 outputs, which vpmaddubsw multiplies with four activations of a row.
// 16-bit sums of `dense_steps` products are exact; then they go to 32 bits. Limited by vpmaddubsw
// and vpaddw: two instructions for 32 products.
template <int kBits, int kRowsAtOnce>
void dense_outputs(int32_t levels, int32_t blocks, const uint8_t* weights, const int8_t* x,
                   int32_t width, int32_t (&out)[kRowsAtOnce][16]) {
  constexpr int32_t kFields = 8 / kBits;
  const __m256i mask = _mm256_set1_epi8((1 << kBits) - 1), ones = _mm256_set1_epi16(1);
  const int32_t most = dense_steps(levels) / kFields;  // blocks; at least 4
  __m256i total[kRowsAtOnce][2];
  LUTRA_UNROLL for (int32_t r = 0; r < kRowsAtOnce; ++r) {
    total[r][0] = total[r][1] = _mm256_setzero_si256();
  }
  while (blocks > 0) {
    const int32_t count = blocks < most ? blocks : most;
    blocks -= count;
    __m256i sum[kRowsAtOnce][2];
    LUTRA_UNROLL for (int32_t r = 0; r < kRowsAtOnce; ++r) {
      sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    }
    for (int32_t b = 0; b < count; ++b, weights += 64) {
      fetch_ahead(weights);
      const __m256i low = load(weights), high = load(weights + 32);
#pragma GCC unroll 8
      for (int32_t j = 0; j < kFields; ++j, x += 4 * width) {
        const __m256i w0 = _mm256_and_si256(_mm256_srli_epi32(low, kBits * j), mask);
        const __m256i w1 = _mm256_and_si256(_mm256_srli_epi32(high, kBits * j), mask);
        LUTRA_UNROLL for (int32_t r = 0; r < kRowsAtOnce; ++r) {
          const __m256i v = broadcast_word(x + 4 * r);
          sum[r][0] = _mm256_add_epi16(sum[r][0], _mm256_maddubs_epi16(w0, v));
          sum[r][1] = _mm256_add_epi16(sum[r][1], _mm256_maddubs_epi16(w1, v));
          keep_order(sum[r][0]);
          keep_order(sum[r][1]);
        }
      }
    }
    LUTRA_UNROLL for (int32_t r = 0; r < kRowsAtOnce; ++r) {
      total[r][0] = _mm256_add_epi32(total[r][0], _mm256_madd_epi16(sum[r][0], ones));
      total[r][1] = _mm256_add_epi32(total[r][1], _mm256_madd_epi16(sum[r][1], ones));
    }
  }
  LUTRA_UNROLL for (int32_t r = 0; r < kRowsAtOnce; ++r) {
    store(out[r], total[r][0]);
    store(out[r] + 8, total[r][1]);
  }
}

template <int kBits, int kRowsAtOnce>
void dense_range(const LowBitShape& s, const uint8_t* packed, const int8_t* x, int32_t width,
                 int32_t rows, int32_t first, int32_t last, int32_t* sums, size_t stride) {
  const int32_t blocks = dense_blocks(s);
  const uint8_t* weights = packed + static_cast<size_t>(first / kLowBitOutputs) * blocks * 64;
  for (int32_t m = first; m < last; m += kLowBitOutputs) {
    const int32_t left = last - m < kLowBitOutputs ? last - m : kLowBitOutputs;
    for (int32_t from = 0; from < rows; from += kRowsAtOnce) {
      int32_t out[kRowsAtOnce][16];
      dense_outputs<kBits, kRowsAtOnce>(s.levels, blocks, weights, x + 4 * from, width, out);
      for (int32_t r = 0; r < kRowsAtOnce && from + r < rows; ++r) {
        int32_t* const to = sums + (from + r) * stride + (m - first);
        if (left == kLowBitOutputs) {
          store(to, load(out[r]));
          store(to + 8, load(out[r] + 8));
        } else {
          for (int32_t i = 0; i < left; ++i) to[i] = out[r][i];
        }
      }
    }
    weights += static_cast<size_t>(blocks) * 64;
  }
}

template <int kBits>
void dense_widths(const LowBitShape& s, const uint8_t* packed, const int8_t* x, int32_t width,
                  int32_t rows, int32_t first, int32_t last, int32_t* sums, size_t stride) {
  if (width == 1) return dense_range<kBits, 1>(s, packed, x, 1, rows, first, last, sums, stride);
  if (width == 2) return dense_range<kBits, 2>(s, packed, x, 2, rows, first, last, sums, stride);
  dense_range<kBits, 4>(s, packed, x, width, rows, first, last, sums, stride);
}

void lowbit_finish(const LowBitFinish& f, int32_t rows, int32_t outputs, const int32_t* sums,
                   size_t sums_stride, float* out, size_t out_stride) {
  const __m256i times = _mm256_set1_epi32(f.times), plus = _mm256_set1_epi32(f.plus);
  for (int32_t r = 0; r < rows; ++r, sums += sums_stride, out += out_stride) {
    const __m256i x_sum = _mm256_set1_epi32(f.x_sum[r]), same = _mm256_mullo_epi32(plus, x_sum);
    const __m256 row_scale = _mm256_set1_ps(f.row_scale ? f.row_scale[r] : 1.0f);
    // d, then y, of 8 outputs
    const auto finish = [&](__m256i sum, __m256i zero, __m256 scale, __m256 before) {
      __m256i d = _mm256_add_epi32(_mm256_mullo_epi32(times, sum), same);
      if (f.zero) d = _mm256_sub_epi32(d, _mm256_mullo_epi32(zero, x_sum));
      __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(d), scale);
      if (!f.first) y = _mm256_add_ps(before, y);
      return f.row_scale ? _mm256_mul_ps(y, row_scale) : y;
    };
    const __m256i none = _mm256_setzero_si256();
    int32_t m = 0;
    for (; m + 8 <= outputs; m += 8) {
      const __m256i zero = f.zero ? load(f.zero + m) : none;
      const __m256 before = f.first ? _mm256_setzero_ps() : _mm256_loadu_ps(out + m);
      _mm256_storeu_ps(out + m, finish(load(sums + m), zero, _mm256_loadu_ps(f.scale + m), before));
    }
    if (m < outputs) {
      const __m256i mask = first_dwords(outputs - m);
      const __m256i zero = f.zero ? _mm256_maskload_epi32(f.zero + m, mask) : none;
      const __m256 before = f.first ? _mm256_setzero_ps() : _mm256_maskload_ps(out + m, mask);
      const __m256 y = finish(_mm256_maskload_epi32(sums + m, mask), zero,
                              _mm256_maskload_ps(f.scale + m, mask), before);
      _mm256_maskstore_ps(out + m, mask, y);
    }
  }
}

// --- words of lowbit_tables.h -------------------------------------------------------------------

constexpr int32_t kWordLanes = 16;
using Words = __m256i;

LUTRA_INLINE Words load_words(const int16_t* p) { return load(p); }
LUTRA_INLINE void store_words(int16_t* p, Words v) { store(p, v); }
LUTRA_INLINE Words add_words(Words a, Words b) { return _mm256_add_epi16(a, b); }
LUTRA_INLINE Words sub_words(Words a, Words b) { return _mm256_sub_epi16(a, b); }
LUTRA_INLINE Words widen_bytes(const int8_t* p) { return _mm256_cvtepi8_epi16(load_half(p)); }
// to[i] = v[i], or += v[i]
LUTRA_INLINE void flush_words(Words v, int32_t* to, bool first) {
  __m256i low = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(v));
  __m256i high = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(v, 1));
  if (!first) {
    low = _mm256_add_epi32(low, load(to));
    high = _mm256_add_epi32(high, load(to + 8));
  }
  store(to, low);
  store(to + 8, high);
}

// Dwords a[i][j] -> a[j][i]
LUTRA_INLINE void transpose_8(__m256i (&a)[8]) {
  __m256i b[8];
#pragma GCC unroll 8
  for (int32_t i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  __m256i c[8];  // c[i + n]: column n of both 128-bit lanes, rows i .. i + 3
#pragma GCC unroll 2
  for (int32_t i = 0; i < 8; i += 4) {
    c[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    c[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    c[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    c[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int32_t n = 0; n < 4; ++n) {
    a[n] = _mm256_permute2x128_si256(c[n], c[n + 4], 0x20);
    a[n + 4] = _mm256_permute2x128_si256(c[n], c[n + 4], 0x31);
  }
}

// A square of sums.
constexpr int32_t kSquare = 8;
using Dwords = __m256i;
LUTRA_INLINE Dwords load_dwords(const int32_t* p) { return load(p); }
LUTRA_INLINE Dwords no_dwords() { return _mm256_setzero_si256(); }
// The first `count`.
LUTRA_INLINE void store_dwords(int32_t* p, int32_t count, Dwords v) {
  _mm256_maskstore_epi32(p, first_dwords(count), v);
}
LUTRA_INLINE void transpose_square(Dwords (&a)[kSquare]) { transpose_8(a); }

}  // namespace
}  // namespace lutra
