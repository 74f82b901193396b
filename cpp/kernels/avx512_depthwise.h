// Depthwise layers, int8 and float32. Private to avx512.cc.
#pragma once

#include "avx512_common.h"
#include "depthwise.h"

namespace lutra {
namespace {

// --- int8 -----------------------------------------------------------------------------------
//
// See depthwise.h: a row of a 3x3 kernel is one vpdpbusd for 16 outputs, and no byte is moved
// between lanes. The 64 sums of a tile come out in four registers, whose order the last
// permutation of the epilogue makes good. Packed masks: [quad][load], 64 bits for 64 bytes.

size_t depthwise8_mask_bytes(const DepthwiseShape& s) {
  return static_cast<size_t>(tap_quads(s).count) * kDepthwiseLoads * sizeof(uint64_t);
}

void pack_depthwise8_masks(const DepthwiseShape& s, const uint64_t* valid, uint8_t* packed) {
  const TapQuads q = tap_quads(s);
  uint64_t* to = reinterpret_cast<uint64_t*>(packed);
  for (int32_t quad = 0; quad < q.count; ++quad) {
    for (int32_t c = 0; c < kDepthwiseLoads; ++c, ++to) {
      *to = 0;
      each_tap(s, q, quad, [&](int32_t tap, int32_t byte) {
        for (int32_t i = 0; i < 16; ++i) {
          *to |= (valid[tap] >> load_row(s.step, 16, c, i) & 1) << (4 * i + byte);
        }
      });
    }
  }
}

__m128i load16(const uint8_t* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

// Sums in the order of the loads -> four blocks of 16 rows.
template <int kStep>
void order_rows(const __m512i* sum, __m512i* rows) {
  if constexpr (kStep == 1) {
    const __m512i lo01 = _mm512_unpacklo_epi32(sum[0], sum[1]);
    const __m512i hi01 = _mm512_unpackhi_epi32(sum[0], sum[1]);
    const __m512i lo23 = _mm512_unpacklo_epi32(sum[2], sum[3]);
    const __m512i hi23 = _mm512_unpackhi_epi32(sum[2], sum[3]);
    const __m512i v0 = _mm512_unpacklo_epi64(lo01, lo23);  // lane l: rows 16 l .. 16 l + 3
    const __m512i v1 = _mm512_unpackhi_epi64(lo01, lo23);
    const __m512i v2 = _mm512_unpacklo_epi64(hi01, hi23);
    const __m512i v3 = _mm512_unpackhi_epi64(hi01, hi23);
    const __m512i a = _mm512_shuffle_i32x4(v0, v1, 0x44), b = _mm512_shuffle_i32x4(v2, v3, 0x44);
    const __m512i c = _mm512_shuffle_i32x4(v0, v1, 0xee), d = _mm512_shuffle_i32x4(v2, v3, 0xee);
    rows[0] = _mm512_shuffle_i32x4(a, b, 0x88);
    rows[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
    rows[2] = _mm512_shuffle_i32x4(c, d, 0x88);
    rows[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
  } else {
    const __m512i lower = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i upper = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
#pragma GCC unroll 2
    for (int32_t h = 0; h < 2; ++h) {
      const __m512i lo = _mm512_unpacklo_epi32(sum[2 * h], sum[2 * h + 1]);
      const __m512i hi = _mm512_unpackhi_epi32(sum[2 * h], sum[2 * h + 1]);
      rows[2 * h] = _mm512_permutex2var_epi64(lo, lower, hi);
      rows[2 * h + 1] = _mm512_permutex2var_epi64(lo, upper, hi);
    }
  }
}

// What packs make of the loads -> bytes in the order of the rows. Inside a lane of 128 bits they
// deliver four rows of each load.
template <int kStep>
__m512i order_bytes(__m512i x) {
  if constexpr (kStep == 1) {
    return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2,
                                                                       6, 10, 14, 3, 7, 11, 15)));
  } else {
    const __m512i pairs =
        _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12,
                                                                    9, 13, 10, 14, 11, 15)));
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), pairs);
  }
}

template <int kStep>
[[gnu::noinline]] void finish_ordered(const __m512i* sum, const Epilogue& e, int32_t m) {
  __m512i rows[4];
  order_rows<kStep>(sum, rows);
  switch (row_blocks(e.rows)) {
    case 1:
      return finish<1>(rows, e, m, 1);
    case 2:
      return finish<2>(rows, e, m, 1);
    case 3:
      return finish<3>(rows, e, m, 1);
    default:
      return finish<4>(rows, e, m, 1);
  }
}

// An epilogue that gives nothing but bytes of one grid, in the order of the loads.
struct ByteEpilogue {
  const Epilogue& e;
  GridVectors grid;
  __m512 low, high;
  __mmask64 mask;

  [[gnu::always_inline]] explicit inline ByteEpilogue(const Epilogue& epilogue)
      : e(epilogue), mask(byte_mask(epilogue.rows)) {
    grid = load_grid(e.q[0].grid);
    low = _mm512_set1_ps(e.low);
    high = _mm512_set1_ps(e.high);
  }

  template <int kStep>
  [[gnu::always_inline]] inline void finish(const __m512i* sum, int32_t m) const {
    const __m512i offset = _mm512_set1_epi32(e.offset ? e.offset[m] : 0);
    __m512 t[4];
#pragma GCC unroll 4
    for (int32_t c = 0; c < 4; ++c) t[c] = _mm512_cvtepi32_ps(_mm512_add_epi32(sum[c], offset));
    if (folds(e, m, 1)) {
      const __m512 scale = _mm512_set1_ps(e.fold_scale[m]), bias = _mm512_set1_ps(e.fold_bias[m]);
#pragma GCC unroll 4
      for (int32_t c = 0; c < 4; ++c) t[c] = _mm512_fmadd_ps(t[c], scale, bias);
    } else {
      const __m512 scale = _mm512_set1_ps(e.scale[m]), bias = _mm512_set1_ps(e.bias[m]);
#pragma GCC unroll 4
      for (int32_t c = 0; c < 4; ++c) {
        t[c] = _mm512_add_ps(_mm512_mul_ps(t[c], scale), bias);
        if (e.clamp) t[c] = _mm512_min_ps(_mm512_max_ps(t[c], low), high);
        t[c] = quotient(t[c], grid);
      }
    }
    __m512i v[4];
#pragma GCC unroll 4
    for (int32_t c = 0; c < 4; ++c) v[c] = _mm512_cvtps_epi32(_mm512_min_ps(grid.high, t[c]));
    const __m512i lo = _mm512_adds_epi16(_mm512_packs_epi32(v[0], v[1]), grid.zero);
    const __m512i hi = _mm512_adds_epi16(_mm512_packs_epi32(v[2], v[3]), grid.zero);
    const __m512i bytes = order_bytes<kStep>(_mm512_packus_epi16(lo, hi));
    _mm512_mask_storeu_epi8(e.q[0].out + m * e.q[0].stride, mask, bytes);
  }
};

// Four planes at a time, for tiles of at most 16 rows at a step of 1: every plane has a lane of 128
// bits, whose four loads deliver 16 sums as in a whole tile. Returns the first output that is left.
template <bool kZero, int kQuads>
int32_t depthwise8_fours(const DepthwiseShape& s, const uint8_t* packed,
                         const DepthwiseTile<uint8_t>& x, int32_t first, int32_t last,
                         const Epilogue& e) {
  const TapQuads q = tap_quads(s);
  const int32_t quads = kQuads > 0 ? kQuads : q.count;
  const uint64_t* const masks = reinterpret_cast<const uint64_t*>(x.masks);
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(x.zero));
  for (; first + 4 <= last; first += 4) {
    __m512i sum[4];
#pragma GCC unroll 4
    for (int32_t c = 0; c < 4; ++c) sum[c] = _mm512_setzero_si512();
    const uint8_t* const plane = x.planes + first * x.plane;
    const int32_t* const w =
        reinterpret_cast<const int32_t*>(packed) + static_cast<size_t>(first) * quads;
    __m512i weights;  // of four quads, lane by lane
#pragma GCC unroll 10
    for (int32_t i = 0; i < quads; ++i) {
      if (i % 4 == 0) {
        const __mmask8 there = static_cast<__mmask8>(lane_mask(quads - i) & 15);
        weights = _mm512_castsi128_si512(_mm_maskz_loadu_epi32(there, w + i));
        weights = _mm512_inserti32x4(weights, _mm_maskz_loadu_epi32(there, w + quads + i), 1);
        weights = _mm512_inserti32x4(weights, _mm_maskz_loadu_epi32(there, w + 2 * quads + i), 2);
        weights = _mm512_inserti32x4(weights, _mm_maskz_loadu_epi32(there, w + 3 * quads + i), 3);
      }
      const __m512i weight = _mm512_shuffle_epi32(weights, _MM_PERM_AAAA);
      // The next quad to the place of the first.
      weights = _mm512_shuffle_epi32(weights, _MM_PERM_ADCB);
      const uint8_t* const from = plane + x.offset[first_tap(s, q, i)];
#pragma GCC unroll 4
      for (int32_t c = 0; c < 4; ++c) {
        __m512i v = _mm512_maskz_broadcast_i32x4(0x000f, load16(from + c));
        v = _mm512_mask_broadcast_i32x4(v, 0x00f0, load16(from + x.plane + c));
        v = _mm512_mask_broadcast_i32x4(v, 0x0f00, load16(from + 2 * x.plane + c));
        v = _mm512_mask_broadcast_i32x4(v, 0xf000, load16(from + 3 * x.plane + c));
        const __mmask64 mask = (masks[4 * i + c] & 0xffff) * 0x0001000100010001;
        v = kZero ? _mm512_maskz_mov_epi8(mask, v) : _mm512_mask_mov_epi8(zero, mask, v);
        sum[c] = _mm512_dpbusd_epi32(sum[c], v, weight);
      }
    }
    __m512i rows[4];  // of an output each
    order_rows<1>(sum, rows);
    finish<1>(rows, e, first, 4);
  }
  return first;
}

template <int kStep, bool kZero, int kQuads>
void depthwise8_outputs(const DepthwiseShape& s, const uint8_t* packed,
                        const DepthwiseTile<uint8_t>& x, int32_t first, int32_t last,
                        const Epilogue& e) {
  if (kStep == 1 && e.rows <= 16 && s.multiplier == 1) {
    first = depthwise8_fours<kZero, kQuads>(s, packed, x, first, last, e);
  }
  const TapQuads q = tap_quads(s);
  const int32_t quads = kQuads > 0 ? kQuads : q.count;
  const uint8_t* at[kQuads > 0 ? kQuads : kMaxDepthwiseTaps];
  for (int32_t i = 0; i < quads; ++i) {
    at[i] = x.planes + first / s.multiplier * x.plane + x.offset[first_tap(s, q, i)];
  }
  const bool simple = e.scale && !e.residual && !e.out && e.quantized == 1;
  const ByteEpilogue epilogue(e);
  const uint64_t* const masks = reinterpret_cast<const uint64_t*>(x.masks);
  const int32_t* w = reinterpret_cast<const int32_t*>(packed) + static_cast<size_t>(first) * quads;
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(x.zero));
  int32_t left = s.multiplier - first % s.multiplier;  // outputs of this plane
  for (int32_t m = first; m < last; ++m, w += quads) {
    __m512i sum[4];
#pragma GCC unroll 4
    for (int32_t c = 0; c < 4; ++c) sum[c] = _mm512_setzero_si512();
#pragma GCC unroll 10
    for (int32_t i = 0; i < quads; ++i) {
      const __m512i weight = _mm512_set1_epi32(w[i]);
#pragma GCC unroll 4
      for (int32_t c = 0; c < 4; ++c) {
        const uint8_t* const from = at[i] + load_offset<kStep, 16>(c);
        const __mmask64 mask = masks[4 * i + c];
        const __m512i v =
            kZero ? _mm512_maskz_loadu_epi8(mask, from) : _mm512_mask_loadu_epi8(zero, mask, from);
        sum[c] = _mm512_dpbusd_epi32(sum[c], v, weight);
      }
    }
    if (simple) {
      epilogue.finish<kStep>(sum, m);
    } else {
      __m512i copy[4];
#pragma GCC unroll 4
      for (int32_t c = 0; c < 4; ++c) copy[c] = sum[c];
      finish_ordered<kStep>(copy, e, m);
    }
    if (--left == 0) {
      left = s.multiplier;
#pragma GCC unroll 10
      for (int32_t i = 0; i < quads; ++i) at[i] += x.plane;
    }
  }
}

// --- float32 --------------------------------------------------------------------------------

template <int kBlocks>
void depthwise_blocks(const DepthwiseShape& s, const float* weights, const DepthwiseTile<float>& x,
                      int32_t first, int32_t last, const Epilogue& e) {
  const uint64_t* const valid = reinterpret_cast<const uint64_t*>(x.masks);
  const float* plane = x.planes + first / s.multiplier * x.plane;
  int32_t left = s.multiplier - first % s.multiplier;
  const float* w = weights + static_cast<size_t>(first) * s.taps;
  for (int32_t m = first; m < last; ++m, w += s.taps) {
    __m512 sum[4];
#pragma GCC unroll 4
    for (int32_t i = 0; i < 4; ++i) sum[i] = _mm512_setzero_ps();
    for (int32_t t = 0; t < s.taps; ++t) {
      const __m512 weight = _mm512_set1_ps(w[t]);
      const float* const from = plane + x.offset[t];
#pragma GCC unroll 4
      for (int32_t i = 0; i < kBlocks; ++i) {
        const __mmask16 mask = static_cast<__mmask16>(valid[t] >> 16 * i);
        sum[i] = _mm512_fmadd_ps(weight, _mm512_maskz_loadu_ps(mask, from + 16 * i), sum[i]);
      }
    }
    finish<kBlocks>(sum, e, m, 1);
    if (--left == 0) {
      left = s.multiplier;
      plane += x.plane;
    }
  }
}

void depthwise(const DepthwiseShape& s, const float* weights, const DepthwiseTile<float>& x,
               int32_t first, int32_t last, const Epilogue& e) {
  switch (row_blocks(e.rows)) {
    case 1:
      return depthwise_blocks<1>(s, weights, x, first, last, e);
    case 2:
      return depthwise_blocks<2>(s, weights, x, first, last, e);
    case 3:
      return depthwise_blocks<3>(s, weights, x, first, last, e);
    default:
      return depthwise_blocks<4>(s, weights, x, first, last, e);
  }
}

}  // namespace
}  // namespace lutra
