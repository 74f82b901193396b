// What all AVX-512 kernels share: sizes, row masks, the grid and the epilogue. Private to
// avx512.cc.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace lutra {
namespace {

constexpr int32_t kRows = 64;    // rows per tile: four blocks of 16, a dword lane for each row
constexpr int32_t kBooks = 4;    // codebooks whose 16-entry slices share one 64-byte register
constexpr int32_t kOutputs = 4;  // outputs per block of packed tables

int32_t ceil_div(int32_t n, int32_t by) { return (n + by - 1) / by; }

int32_t row_blocks(int32_t rows) { return ceil_div(rows, kRowBlock); }

int32_t log2_of(int32_t n) { return 31 - __builtin_clz(static_cast<uint32_t>(n)); }

__mmask16 lane_mask(int32_t left) {
  if (left >= 16) return 0xffff;
  return left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

__mmask64 byte_mask(int32_t left) { return left >= 64 ? ~0ull : (1ull << left) - 1; }

// dword 4 j + q <- dword 4 q + j: undoes what the pack and unpack instructions do, which work
// inside lanes of 128 bits. Its own inverse.
__m512i transpose_dwords(__m512i x) {
  const __m512i index = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(index, x);
}

struct GridVectors {
  __m512 scale, inverse, high, above;
  __m512i zero;
  bool divide;
};

GridVectors load_grid(const Grid& g) {
  const float high = static_cast<float>(g.qmax - g.zero);
  return {_mm512_set1_ps(g.scale),
          _mm512_set1_ps(g.inverse),
          _mm512_set1_ps(high),
          _mm512_set1_ps(high + 1.0f),
          _mm512_set1_epi16(static_cast<int16_t>(g.zero)),
          g.inverse == 0.0f};
}

// round_half_even(x / scale) as int32, at most `high`. There is no lower clamp: whatever is too low
// becomes negative here (INT_MIN for NaN), and saturating packs take care of it. min(a, b) returns
// b when one is NaN. The upper clamp before the correction keeps +inf and quotients that overflow
// from becoming NaN; those below may, since NaN and -inf have the same result.
__m512i to_steps(__m512 x, const GridVectors& g) {
  __m512 t;
  if (g.divide) {
    t = _mm512_div_ps(x, g.scale);
  } else {
    t = _mm512_min_ps(g.above, _mm512_mul_ps(x, g.inverse));
    t = _mm512_fmadd_ps(_mm512_fnmadd_ps(t, g.scale, x), g.inverse, t);
  }
  return _mm512_cvtps_epi32(_mm512_min_ps(g.high, t));
}

// 16 kBlocks values -> bytes of the grid, in the order of the values.
template <int kBlocks>
__m512i to_grid(const __m512* x, const GridVectors& g) {
  __m512i v[4];
  for (int32_t b = 0; b < 4; ++b) v[b] = b < kBlocks ? to_steps(x[b], g) : v[0];
  const __m512i lo = _mm512_adds_epi16(_mm512_packs_epi32(v[0], v[1]), g.zero);
  const __m512i hi = kBlocks > 2 ? _mm512_adds_epi16(_mm512_packs_epi32(v[2], v[3]), g.zero) : lo;
  return transpose_dwords(_mm512_packus_epi16(lo, hi));
}

// The first `count` bytes of a register.
void store_bytes(uint8_t* to, __m512i v, int32_t count) {
  if (count == 64) {
    _mm512_storeu_si512(to, v);
  } else if (count == 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(v));
  } else {
    _mm512_mask_storeu_epi8(to, byte_mask(count), v);
  }
}

// The rows of output m: 16 kBlocks of them, those of the last block masked.
template <int kBlocks>
void finish_floats(__m512* y, const Epilogue& e, int32_t m) {
  const __mmask16 last = lane_mask(e.rows - 16 * (kBlocks - 1));
  const auto mask = [last](int32_t b) { return b + 1 < kBlocks ? __mmask16{0xffff} : last; };
  if (e.scale) {
    const __m512 scale = _mm512_set1_ps(e.scale[m]);
    for (int32_t b = 0; b < kBlocks; ++b) y[b] = _mm512_mul_ps(y[b], scale);
  }
  const __m512 bias = _mm512_set1_ps(e.bias[m]);
  for (int32_t b = 0; b < kBlocks; ++b) y[b] = _mm512_add_ps(y[b], bias);
  if (e.residual) {
    const float* const from = e.residual + m * e.residual_stride;
    for (int32_t b = 0; b < kBlocks; ++b) {
      y[b] = _mm512_add_ps(y[b], _mm512_maskz_loadu_ps(mask(b), from + 16 * b));
    }
  }
  bool implied = !e.out && e.low == 0.0f && e.high == __builtin_inff();  // by the grids' own clamp
  for (int32_t i = 0; i < e.quantized; ++i) implied &= e.q[i].grid.zero == 0;
  if (e.clamp && !implied) {
    const __m512 low = _mm512_set1_ps(e.low), high = _mm512_set1_ps(e.high);
    for (int32_t b = 0; b < kBlocks; ++b) y[b] = _mm512_min_ps(_mm512_max_ps(y[b], low), high);
  }
  if (e.out) {
    float* const to = e.out + m * e.out_stride;
    for (int32_t b = 0; b + 1 < kBlocks; ++b) _mm512_storeu_ps(to + 16 * b, y[b]);
    if (last == 0xffff) {
      _mm512_storeu_ps(to + 16 * (kBlocks - 1), y[kBlocks - 1]);
    } else {
      _mm512_mask_storeu_ps(to + 16 * (kBlocks - 1), last, y[kBlocks - 1]);
    }
  }
  for (int32_t i = 0; i < e.quantized; ++i) {
    const __m512i v = to_grid<kBlocks>(y, load_grid(e.q[i].grid));
    store_bytes(e.q[i].out + m * e.q[i].stride, v, e.rows);
  }
}

// sums: [output][block], of outputs m .. m + count - 1
template <int kBlocks>
void finish(const __m512* sums, const Epilogue& e, int32_t m, int32_t count) {
  for (int32_t o = 0; o < count; ++o, sums += kBlocks) {
    __m512 y[kBlocks];
    for (int32_t b = 0; b < kBlocks; ++b) y[b] = sums[b];
    finish_floats<kBlocks>(y, e, m + o);
  }
}

template <int kBlocks>
void finish(const __m512i* sums, const Epilogue& e, int32_t m, int32_t count) {
  for (int32_t o = 0; o < count; ++o, sums += kBlocks) {
    const __m512i offset = _mm512_set1_epi32(e.offset ? e.offset[m + o] : 0);
    __m512 y[kBlocks];
    for (int32_t b = 0; b < kBlocks; ++b) {
      y[b] = _mm512_cvtepi32_ps(_mm512_add_epi32(sums[b], offset));
    }
    finish_floats<kBlocks>(y, e, m + o);
  }
}

}  // namespace
}  // namespace lutra
