// Low-bit weights. Private to avx512.cc; lowbit.h has the order of packed weights, and
// lowbit_tables.h the kernel of tables, which is written in the words at the end of this file.
#pragma once

#include "avx512_lanes.h"
#include "functions.h"
#include "lowbit.h"

namespace lutra {
namespace {

float lowbit_quantize(const float* x, size_t n, int8_t* q) {
  // Magnitudes as integers: infinities and NaN are above all numbers.
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (size_t i = 0; i < n; i += 16) {
    const int32_t left = n - i < 16 ? static_cast<int32_t>(n - i) : 16;
    const __m512i v = _mm512_maskz_loadu_epi32(lane_mask(left), x + i);
    most = _mm512_max_epi32(most, _mm512_and_si512(v, magnitude));
  }
  const int32_t top_bits = _mm512_reduce_max_epi32(most);
  if (top_bits >= kInfinityBits) return no_row(n, q);
  const float top = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(top_bits)));
  const bool zero = top < 0x1p-120f;
  const __m512 inverse = _mm512_set1_ps(zero ? 0.0f : 127.0f / top);
  for (size_t i = 0; i < n; i += 16) {
    const __mmask16 mask = lane_mask(n - i < 16 ? static_cast<int32_t>(n - i) : 16);
    const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse);
    _mm_mask_storeu_epi8(q + i, mask, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  return zero ? 0.0f : top / 127.0f;
}

// Nothing, but not for the compiler, which otherwise loads so many activations ahead that sums do
// not stay in registers.
LUTRA_INLINE void keep(__m512i& v) { __asm__ volatile("" : "+v"(v)); }

// Asks for the weights `ahead` bytes further on: where they come from beyond the second-level
// cache, the hardware alone asks too late for few rows, which read 64 bytes in six cycles. Any
// address will do.
LUTRA_INLINE void fetch_ahead(const uint8_t* weights, size_t ahead) {
  _mm_prefetch(reinterpret_cast<const char*>(weights) + ahead, _MM_HINT_T1);
}

// --- the dense kernel ---------------------------------------------------------------------------
//
// 32 outputs x kWidth rows, as two blocks of 16: a sum of a row is a register with a dword for each
// output. A block of 64 bytes becomes, field after field, a register of four neighbouring weights
// of 16 outputs, which vpdpbusd multiplies with four activations of a row, broadcast from memory.
// One broadcast serves two vpdpbusd, of which there are 24 for 12 rows: they are the limit from 8
// rows on. Below, the limit is unpacking (a shift and an and for each), or memory.
template <int kBits, int kBlocks, int kWidth>
LUTRA_INLINE void dense_outputs(int32_t blocks, const uint8_t* weights, const int8_t* x,
                                __m512i* out) {
  constexpr int32_t kFields = 8 / kBits;
  constexpr int32_t kChains = kWidth == 1 ? 4 : kWidth == 2 ? 2 : 1;  // sums that hide latency
  constexpr int32_t kSums = kBlocks * kWidth;
  const __m512i mask = _mm512_set1_epi8((1 << kBits) - 1);
  const size_t next = static_cast<size_t>(blocks) * 64;
  __m512i sum[kChains * kSums];
#pragma GCC unroll 32
  for (int32_t i = 0; i < kChains * kSums; ++i) sum[i] = _mm512_setzero_si512();
  for (; blocks > 0; --blocks, weights += 64) {
    __m512i packed[kBlocks];
#pragma GCC unroll 2
    for (int32_t b = 0; b < kBlocks; ++b) {
      packed[b] = _mm512_loadu_si512(weights + b * next);
      fetch_ahead(weights + b * next, kBlocks * next);  // of the next outputs
    }
#pragma GCC unroll 8
    for (int32_t j = 0; j < kFields; ++j, x += 4 * kWidth) {
      __m512i w[kBlocks];
#pragma GCC unroll 2
      for (int32_t b = 0; b < kBlocks; ++b) {
        w[b] = _mm512_and_si512(_mm512_srli_epi32(packed[b], kBits * j), mask);
      }
#pragma GCC unroll 12
      for (int32_t r = 0; r < kWidth; ++r) {
        const __m512i v = _mm512_set1_epi32(reinterpret_cast<const int32_t*>(x)[r]);
#pragma GCC unroll 2
        for (int32_t b = 0; b < kBlocks; ++b) {
          __m512i& s = sum[(j % kChains) * kSums + b * kWidth + r];
          s = _mm512_dpbusd_epi32(s, w[b], v);
          keep(s);
        }
      }
    }
  }
#pragma GCC unroll 32
  for (int32_t i = 0; i < kSums; ++i) {
    __m512i all = sum[i];
#pragma GCC unroll 4
    for (int32_t c = 1; c < kChains; ++c) all = _mm512_add_epi32(all, sum[c * kSums + i]);
    out[i] = all;
  }
}

template <int kBits, int kBlocks, int kWidth>
void dense_step(int32_t blocks, const uint8_t* weights, const int8_t* x, int32_t rows, int32_t left,
                int32_t* sums, size_t stride) {
  __m512i out[kBlocks * kWidth];
  dense_outputs<kBits, kBlocks, kWidth>(blocks, weights, x, out);
#pragma GCC unroll 12
  for (int32_t r = 0; r < kWidth; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 2
    for (int32_t b = 0; b < kBlocks; ++b) {
      _mm512_mask_storeu_epi32(sums + r * stride + b * kLowBitOutputs,
                               lane_mask(left - b * kLowBitOutputs), out[b * kWidth + r]);
    }
  }
}

template <int kBits, int kWidth>
void dense_range(const LowBitShape& s, const uint8_t* packed, const int8_t* x, int32_t rows,
                 int32_t first, int32_t last, int32_t* sums, size_t stride) {
  const int32_t blocks = dense_blocks(s);
  const size_t block_bytes = static_cast<size_t>(blocks) * 64;
  const uint8_t* weights = packed + static_cast<size_t>(first / kLowBitOutputs) * block_bytes;
  int32_t m = first;
  for (; last - m > kLowBitOutputs; m += 2 * kLowBitOutputs, weights += 2 * block_bytes) {
    dense_step<kBits, 2, kWidth>(blocks, weights, x, rows, last - m, sums + (m - first), stride);
  }
  if (m < last) {
    dense_step<kBits, 1, kWidth>(blocks, weights, x, rows, last - m, sums + (m - first), stride);
  }
}

template <int kBits>
void dense_widths(const LowBitShape& s, const uint8_t* packed, const int8_t* x, int32_t width,
                  int32_t rows, int32_t first, int32_t last, int32_t* sums, size_t stride) {
  switch (width) {
    case 1:
      return dense_range<kBits, 1>(s, packed, x, rows, first, last, sums, stride);
    case 2:
      return dense_range<kBits, 2>(s, packed, x, rows, first, last, sums, stride);
    case 4:
      return dense_range<kBits, 4>(s, packed, x, rows, first, last, sums, stride);
    case 8:
      return dense_range<kBits, 8>(s, packed, x, rows, first, last, sums, stride);
    default:
      return dense_range<kBits, 12>(s, packed, x, rows, first, last, sums, stride);
  }
}

void lowbit_finish(const LowBitFinish& f, int32_t rows, int32_t outputs, const int32_t* sums,
                   size_t sums_stride, float* out, size_t out_stride) {
  const __m512i times = _mm512_set1_epi32(f.times), plus = _mm512_set1_epi32(f.plus);
  for (int32_t r = 0; r < rows; ++r, sums += sums_stride, out += out_stride) {
    const __m512i x_sum = _mm512_set1_epi32(f.x_sum[r]);
    for (int32_t m = 0; m < outputs; m += 16) {
      const __mmask16 mask = lane_mask(outputs - m);
      const __m512i p =
          f.zero ? _mm512_sub_epi32(plus, _mm512_maskz_loadu_epi32(mask, f.zero + m)) : plus;
      const __m512i d =
          _mm512_add_epi32(_mm512_mullo_epi32(times, _mm512_maskz_loadu_epi32(mask, sums + m)),
                           _mm512_mullo_epi32(p, x_sum));
      __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(d), _mm512_maskz_loadu_ps(mask, f.scale + m));
      if (!f.first) y = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out + m), y);
      if (f.row_scale) y = _mm512_mul_ps(y, _mm512_set1_ps(f.row_scale[r]));
      _mm512_mask_storeu_ps(out + m, mask, y);
    }
  }
}

// --- words of lowbit_tables.h -------------------------------------------------------------------

constexpr int32_t kWordLanes = 32;
using Words = __m512i;

LUTRA_INLINE Words load_words(const int16_t* p) { return _mm512_load_si512(p); }
LUTRA_INLINE void store_words(int16_t* p, Words v) { _mm512_store_si512(p, v); }
LUTRA_INLINE Words add_words(Words a, Words b) { return _mm512_add_epi16(a, b); }
LUTRA_INLINE Words sub_words(Words a, Words b) { return _mm512_sub_epi16(a, b); }
LUTRA_INLINE Words widen_bytes(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// to[i] = v[i], or += v[i]
LUTRA_INLINE void flush_words(Words v, int32_t* to, bool first) {
  __m512i low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(v));
  __m512i high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(v, 1));
  if (!first) {
    low = _mm512_add_epi32(low, _mm512_load_si512(to));
    high = _mm512_add_epi32(high, _mm512_load_si512(to + 16));
  }
  _mm512_store_si512(to, low);
  _mm512_store_si512(to + 16, high);
}

// Dwords a[i][j] -> a[j][i]
LUTRA_INLINE void transpose_16(__m512i (&a)[16]) {
  __m512i b[16];
#pragma GCC unroll 16
  for (int32_t i = 0; i < 16; i += 2) {  // pairs of rows
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int32_t i = 0; i < 16; i += 4) {  // a[i + c]: column c of every 128-bit lane, four rows
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int32_t c = 0; c < 4; ++c) {
    const __m512i even0 = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x88);
    const __m512i odd0 = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xdd);
    const __m512i even1 = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x88);
    const __m512i odd1 = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xdd);
    b[c] = _mm512_shuffle_i32x4(even0, even1, 0x88);      // lane 0: columns c
    b[c + 4] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);    // lane 1: columns 4 + c
    b[c + 8] = _mm512_shuffle_i32x4(even0, even1, 0xdd);  // lane 2
    b[c + 12] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);   // lane 3
  }
#pragma GCC unroll 16
  for (int32_t i = 0; i < 16; ++i) a[i] = b[i];
}

// A square of sums.
constexpr int32_t kSquare = 16;
using Dwords = __m512i;
LUTRA_INLINE Dwords load_dwords(const int32_t* p) { return _mm512_load_si512(p); }
LUTRA_INLINE Dwords no_dwords() { return _mm512_setzero_si512(); }
// The first `count`.
LUTRA_INLINE void store_dwords(int32_t* p, int32_t count, Dwords v) {
  _mm512_mask_storeu_epi32(p, lane_mask(count), v);
}
LUTRA_INLINE void transpose_square(Dwords (&a)[kSquare]) { transpose_16(a); }

}  // namespace
}  // namespace lutra
