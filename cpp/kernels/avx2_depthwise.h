// AVX2: depthwise layers, int8 and float32. Private to avx2.cc.
#pragma once

#include "avx2_dense.h"
#include "depthwise.h"

namespace lutra {
namespace {

// --- int8 ----------------------------------------------------------------------------------------
//
// See depthwise.h: a row of a 3x3 kernel is one vpmaddubsw for 8 outputs, and no byte is moved
// between lanes. 32 rows at a time, in four registers, whose order the epilogue makes good.
// Packed masks: [half of the tile][quad][load][32 bytes].

size_t depthwise8_mask_bytes(const DepthwiseShape& s) {
  return static_cast<size_t>(tap_quads(s).count) * kDepthwiseLoads * kRows;
}

void pack_depthwise8_masks(const DepthwiseShape& s, const uint64_t* valid, uint8_t* packed) {
  const TapQuads q = tap_quads(s);
  for (int32_t row = 0; row < kRows; row += kSubRows) {
    for (int32_t quad = 0; quad < q.count; ++quad) {
      for (int32_t c = 0; c < kDepthwiseLoads; ++c, packed += 32) {
        store(packed, _mm256_setzero_si256());
        each_tap(s, q, quad, [&](int32_t tap, int32_t byte) {
          for (int32_t i = 0; i < 8; ++i) {
            const uint64_t bit = valid[tap] >> (row + load_row(s.step, 8, c, i)) & 1;
            packed[4 * i + byte] = bit ? 255 : 0;
          }
        });
      }
    }
  }
}

// Sums in the order of the loads -> 32 rows.
template <int kStep>
LUTRA_INLINE void order_rows(const __m256i* sum, __m256i* rows) {
  const __m256i lo01 = _mm256_unpacklo_epi32(sum[0], sum[1]);
  const __m256i hi01 = _mm256_unpackhi_epi32(sum[0], sum[1]);
  const __m256i lo23 = _mm256_unpacklo_epi32(sum[2], sum[3]);
  const __m256i hi23 = _mm256_unpackhi_epi32(sum[2], sum[3]);
  if constexpr (kStep == 1) {
    const __m256i v0 = _mm256_unpacklo_epi64(lo01, lo23);  // lane l: rows 16 l .. 16 l + 3
    const __m256i v1 = _mm256_unpackhi_epi64(lo01, lo23);
    const __m256i v2 = _mm256_unpacklo_epi64(hi01, hi23);
    const __m256i v3 = _mm256_unpackhi_epi64(hi01, hi23);
    rows[0] = _mm256_permute2x128_si256(v0, v1, 0x20);
    rows[1] = _mm256_permute2x128_si256(v2, v3, 0x20);
    rows[2] = _mm256_permute2x128_si256(v0, v1, 0x31);
    rows[3] = _mm256_permute2x128_si256(v2, v3, 0x31);
  } else {
    rows[0] = _mm256_permute2x128_si256(lo01, hi01, 0x20);
    rows[1] = _mm256_permute2x128_si256(lo01, hi01, 0x31);
    rows[2] = _mm256_permute2x128_si256(lo23, hi23, 0x20);
    rows[3] = _mm256_permute2x128_si256(lo23, hi23, 0x31);
  }
}

// What packs make of the loads -> bytes in the order of the rows. Inside a lane of 128 bits they
// deliver four rows of each load.
template <int kStep>
LUTRA_INLINE __m256i order_bytes(__m256i x) {
  if constexpr (kStep == 1) {
    return _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                      0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
  } else {
    const __m256i pairs =
        _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                   0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)));
    return _mm256_permute4x64_epi64(pairs, 0xd8);
  }
}

template <int kStep>
[[gnu::noinline]] void finish_ordered(const __m256i* sum, const Finish& finish, int32_t m,
                                      int32_t row) {
  __m256i rows[4];
  order_rows<kStep>(sum, rows);
  finish.sums<4>(m, row, 0, rows);
}

// An epilogue that gives nothing but bytes of one grid, in the order of the loads.
template <int kStep>
LUTRA_INLINE void finish_bytes(const __m256i* sum, const Finish& finish, int32_t m, int32_t row) {
  const Epilogue& e = finish.e;
  const GridVectors& grid = finish.grid[0];
  const __m256i offset = _mm256_set1_epi32(e.offset ? e.offset[m] : 0);
  __m256 t[4];
  LUTRA_UNROLL for (int32_t c = 0; c < 4; ++c) {
    t[c] = _mm256_cvtepi32_ps(_mm256_add_epi32(sum[c], offset));
  }
  if (finish.folds(m)) {
    const __m256 scale = _mm256_set1_ps(e.fold_scale[m]), bias = _mm256_set1_ps(e.fold_bias[m]);
    LUTRA_UNROLL for (int32_t c = 0; c < 4; ++c) t[c] = _mm256_fmadd_ps(t[c], scale, bias);
  } else {
    const __m256 scale = _mm256_set1_ps(e.scale[m]), bias = _mm256_set1_ps(e.bias[m]);
    const __m256 low = _mm256_set1_ps(e.low), high = _mm256_set1_ps(e.high);
    LUTRA_UNROLL for (int32_t c = 0; c < 4; ++c) {
      t[c] = _mm256_add_ps(_mm256_mul_ps(t[c], scale), bias);
      if (e.clamp) t[c] = _mm256_min_ps(_mm256_max_ps(t[c], low), high);
      t[c] = quotient(t[c], grid);
    }
  }
  const __m256i bytes = order_bytes<kStep>(
      _mm256_packus_epi16(grid_words(t[0], t[1], grid), grid_words(t[2], t[3], grid)));
  uint8_t* const to = e.q[0].out + m * e.q[0].stride + row;
  const int32_t left = e.rows - row;
  if (left >= 32) return store(to, bytes);
  store_bytes(to, _mm256_castsi256_si128(bytes), left);
  if (left > 16) store_bytes(to + 16, _mm256_extracti128_si256(bytes, 1), left - 16);
}

template <int kStep, bool kZero, int kQuads>
void depthwise8_outputs(const DepthwiseShape& s, const uint8_t* packed,
                        const DepthwiseTile<uint8_t>& x, int32_t first, int32_t last,
                        const Epilogue& e) {
  const Finish finish(e);
  const bool simple = e.scale && !e.residual && !e.out && e.quantized == 1;
  const TapQuads q = tap_quads(s);
  const int32_t quads = kQuads > 0 ? kQuads : q.count;
  int64_t at[kQuads > 0 ? kQuads : kMaxDepthwiseTaps];
  for (int32_t i = 0; i < quads; ++i) at[i] = x.offset[first_tap(s, q, i)];
  const __m256i zero = _mm256_set1_epi8(static_cast<char>(x.zero));
  const uint8_t* w = packed + static_cast<size_t>(first) * quads * 4;
  const uint8_t* plane = x.planes + first / s.multiplier * x.plane;
  int32_t left = s.multiplier - first % s.multiplier;  // outputs of this plane
  for (int32_t m = first; m < last; ++m, w += 4 * quads) {
    const uint8_t* mask = x.masks;
    for (int32_t row = 0; row < finish.e.rows; row += kSubRows) {
      __m256i sum[4];
      LUTRA_UNROLL for (int32_t c = 0; c < 4; ++c) sum[c] = _mm256_setzero_si256();
      for (int32_t i = 0; i < quads; ++i, mask += 4 * 32) {
        const __m256i weight = broadcast_word(w + 4 * i);
        const uint8_t* const from = plane + at[i] + row * kStep;
        LUTRA_UNROLL for (int32_t c = 0; c < 4; ++c) {
          const __m256i v = load(from + load_offset<kStep, 8>(c)), in = load(mask + 32 * c);
          sum[c] = dot4(sum[c], kZero ? _mm256_and_si256(v, in) : _mm256_blendv_epi8(zero, v, in),
                        weight);
        }
      }
      if (simple) {
        finish_bytes<kStep>(sum, finish, m, row);
      } else {
        __m256i copy[4];
        LUTRA_UNROLL for (int32_t c = 0; c < 4; ++c) copy[c] = sum[c];
        finish_ordered<kStep>(copy, finish, m, row);
      }
    }
    if (--left == 0) {
      left = s.multiplier;
      plane += x.plane;
    }
  }
}

// --- float32 -------------------------------------------------------------------------------------
//
// 16 rows at a time. Only tiles that touch the border of the image take masked loads.

// Bits 0..7 -> lanes, as masked loads want them.
LUTRA_INLINE __m256i lane_signs(uint64_t bits) {
  const __m256i up = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
  return _mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int32_t>(bits & 255)), up);
}

template <bool kWhole>
LUTRA_INLINE void depthwise_rows(int32_t taps, const float* w, const float* plane,
                                 const int32_t* offset, const uint64_t* valid, int32_t row,
                                 __m256* sum) {
  sum[0] = sum[1] = _mm256_setzero_ps();
  for (int32_t t = 0; t < taps; ++t) {
    const __m256 weight = _mm256_set1_ps(w[t]);
    const float* const from = plane + offset[t] + row;
    LUTRA_UNROLL for (int32_t i = 0; i < 2; ++i) {
      const __m256 v =
          kWhole ? _mm256_loadu_ps(from + 8 * i)
                 : _mm256_maskload_ps(from + 8 * i, lane_signs(valid[t] >> (row + 8 * i)));
      sum[i] = _mm256_fmadd_ps(weight, v, sum[i]);
    }
  }
}

void depthwise(const DepthwiseShape& s, const float* weights, const DepthwiseTile<float>& x,
               int32_t first, int32_t last, const Epilogue& e) {
  const Finish finish(e);
  const uint64_t* const valid = reinterpret_cast<const uint64_t*>(x.masks);
  uint64_t inside = ~uint64_t{0};  // rows all of whose taps are
  for (int32_t t = 0; t < s.taps; ++t) inside &= valid[t];
  const float* plane = x.planes + first / s.multiplier * x.plane;
  int32_t left = s.multiplier - first % s.multiplier;
  const float* w = weights + static_cast<size_t>(first) * s.taps;
  for (int32_t m = first; m < last; ++m, w += s.taps) {
    for (int32_t row = 0; row < finish.e.rows; row += 16) {
      __m256 sum[2];
      if ((inside >> row & 0xffff) == 0xffff) {
        depthwise_rows<true>(s.taps, w, plane, x.offset, valid, row, sum);
      } else {
        depthwise_rows<false>(s.taps, w, plane, x.offset, valid, row, sum);
      }
      finish.sums<2>(m, row, sum);
    }
    if (--left == 0) {
      left = s.multiplier;
      plane += x.plane;
    }
  }
}

}  // namespace
}  // namespace lutra
