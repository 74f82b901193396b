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

// Codes of a tile: [group of 4 codebooks][block of 16 rows][64 bytes], as many blocks as the tile
// has. Dword i belongs to row i of the block, byte j to codebook 4 c + j, and holds (code & 15) | j
// << 4 | (code >> 4) << 6: as it is, the index of vpermb and vpermi2b into a register of 4
// codebooks x 16 entries.
constexpr int32_t kBookBits = 0x30201000;  // byte j: j << 4

// Such dwords are the units of planes of codes, where the codebooks of a part divide by four. Then
// codebooks 4 q .. 4 q + 3 of part t are group q T + t.
int32_t code_unit(const PqShape& s) {
  return s.parts > 1 && s.codebooks / s.parts % kBooks == 0 ? kBooks : 1;
}

// The codebook that is number j of a group.
int32_t book_of(const PqShape& s, int32_t group, int32_t j) {
  if (code_unit(s) == 1) return group * kBooks + j;
  return (group / s.parts * kBooks + j) * s.parts + group % s.parts;
}

uint8_t* codes_at(uint8_t* codes, int32_t codebook, int32_t blocks) {
  return codes + static_cast<size_t>(codebook / kBooks) * blocks * 64;
}

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

// x / scale, of which only those below `high` need be exact. min(a, b) returns b when one is NaN.
// The clamp before the correction keeps +inf and quotients that overflow from becoming NaN; those
// below may, since NaN and -inf have the same result.
__m512 quotient(__m512 x, const GridVectors& g) {
  if (g.divide) return _mm512_div_ps(x, g.scale);
  const __m512 t = _mm512_min_ps(g.above, _mm512_mul_ps(x, g.inverse));
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(t, g.scale, x), g.inverse, t);
}

// --- epilogue -------------------------------------------------------------------------------
//
// Done for a "batch" of up to four vectors at a time, so that few rows do not mean short registers:
// kBatch<1> = 4 outputs of one block, 2 of two, 1 of three or four. Vector i belongs to output
// i / kBlocks of the batch and to block i % kBlocks.

template <int kBlocks>
constexpr int kBatch = kBlocks == 1   ? 4
                       : kBlocks == 2 ? 2
                                      : 1;

// Quotients of up to four vectors -> bytes of the grid in their order. There is no lower clamp:
// whatever is too low becomes negative (INT_MIN for NaN), and the packs saturate.
template <int kVectors>
__m512i to_bytes(const __m512* t, const GridVectors& g) {
  __m512i v[4];
#pragma GCC unroll 4
  for (int32_t i = 0; i < 4; ++i) {
    v[i] = i < kVectors ? _mm512_cvtps_epi32(_mm512_min_ps(g.high, t[i])) : v[0];
  }
  const __m512i lo = _mm512_adds_epi16(_mm512_packs_epi32(v[0], v[1]), g.zero);
  const __m512i hi = kVectors > 2 ? _mm512_adds_epi16(_mm512_packs_epi32(v[2], v[3]), g.zero) : lo;
  return transpose_dwords(_mm512_packus_epi16(lo, hi));
}

// The bytes of `count` outputs of a batch, `stride` apart.
template <int kBlocks>
void store_bytes(uint8_t* to, size_t stride, __m512i v, int32_t rows, int32_t count) {
  if constexpr (kBlocks == 1) {
    const __m128i part[4] = {_mm512_castsi512_si128(v), _mm512_extracti32x4_epi32(v, 1),
                             _mm512_extracti32x4_epi32(v, 2), _mm512_extracti32x4_epi32(v, 3)};
    const __mmask16 mask = lane_mask(rows);
#pragma GCC unroll 4
    for (int32_t o = 0; o < 4; ++o) {
      if (o < count) _mm_mask_storeu_epi8(to + o * stride, mask, part[o]);
    }
  } else if constexpr (kBlocks == 2) {
    const __mmask32 mask = static_cast<__mmask32>(byte_mask(rows));
    _mm256_mask_storeu_epi8(to, mask, _mm512_castsi512_si256(v));
    if (count > 1) _mm256_mask_storeu_epi8(to + stride, mask, _mm512_extracti64x4_epi64(v, 1));
  } else if (rows == 64) {
    _mm512_storeu_si512(to, v);
  } else {
    _mm512_mask_storeu_epi8(to, byte_mask(rows), v);
  }
}

// The chain of an epilogue, with what all outputs share in registers. A copy, so that no store can
// change it. The clamp is left out where the grids clamp to the same.
struct Chain {
  Epilogue e;
  bool clamp;
  __m512 low, high;
  GridVectors grid[kMaxQuantized];

  [[gnu::always_inline]] explicit Chain(const Epilogue& epilogue) : e(epilogue) {
    bool implied = !e.out && e.low == 0.0f && e.high == __builtin_inff();
    for (int32_t i = 0; i < e.quantized; ++i) implied &= e.q[i].grid.zero == 0;
    clamp = e.clamp && !implied;
    low = _mm512_set1_ps(e.low);
    high = _mm512_set1_ps(e.high);
    for (int32_t i = 0; i < e.quantized; ++i) grid[i] = load_grid(e.q[i].grid);
  }
};

// Outputs m .. m + count - 1, at most kBatch<kBlocks>; the rows of the last block are masked unless
// all are there.
template <int kBlocks, bool kWhole>
[[gnu::always_inline]] inline void finish_batch(__m512* y, const Chain& c, int32_t m,
                                                int32_t count) {
  constexpr int32_t kVectors = kBatch<kBlocks> * kBlocks;
  const Epilogue& e = c.e;
  const __mmask16 last = kWhole ? __mmask16{0xffff} : lane_mask(e.rows - 16 * (kBlocks - 1));
  const auto output = [&](int32_t i) {  // those missing repeat the last one
    return kBatch<kBlocks> == 1 || i / kBlocks < count ? m + i / kBlocks : m + count - 1;
  };
  const auto mask = [&](int32_t i) {
    return kWhole || i % kBlocks + 1 < kBlocks ? __mmask16{0xffff} : last;
  };
  if (e.scale) {
#pragma GCC unroll 4
    for (int32_t i = 0; i < kVectors; ++i) {
      y[i] = _mm512_mul_ps(y[i], _mm512_set1_ps(e.scale[output(i)]));
    }
  }
#pragma GCC unroll 4
  for (int32_t i = 0; i < kVectors; ++i) {
    y[i] = _mm512_add_ps(y[i], _mm512_set1_ps(e.bias[output(i)]));
  }
  if (e.residual) {
#pragma GCC unroll 4
    for (int32_t i = 0; i < kVectors; ++i) {
      const float* const from = e.residual + output(i) * e.residual_stride + i % kBlocks * 16;
      y[i] = _mm512_add_ps(y[i], _mm512_maskz_loadu_ps(mask(i), from));
    }
  }
  if (c.clamp) {
#pragma GCC unroll 4
    for (int32_t i = 0; i < kVectors; ++i) {
      y[i] = _mm512_min_ps(_mm512_max_ps(y[i], c.low), c.high);
    }
  }
  if (e.out) {
#pragma GCC unroll 4
    for (int32_t i = 0; i < kVectors; ++i) {
      float* const to = e.out + output(i) * e.out_stride + i % kBlocks * 16;
      if (kBatch<kBlocks> == 1 || i / kBlocks < count) _mm512_mask_storeu_ps(to, mask(i), y[i]);
    }
  }
#pragma GCC unroll 2
  for (int32_t q = 0; q < kMaxQuantized; ++q) {
    if (q >= e.quantized) break;
    __m512 t[kVectors];
#pragma GCC unroll 4
    for (int32_t i = 0; i < kVectors; ++i) t[i] = quotient(y[i], c.grid[q]);
    store_bytes<kBlocks>(e.q[q].out + m * e.q[q].stride, e.q[q].stride,
                         to_bytes<kVectors>(t, c.grid[q]), e.rows, count);
  }
}

template <int kBlocks, bool kWhole, class Sums>
[[gnu::always_inline]] inline void finish_batches(const Epilogue& e, int32_t m, int32_t count,
                                                  const Sums& sums) {
  constexpr int32_t kStep = kBatch<kBlocks>;
  const Chain chain(e);
  for (int32_t i = 0; i < count; i += kStep) {
    const int32_t some = count - i < kStep ? count - i : kStep;
    __m512 y[kStep * kBlocks];
#pragma GCC unroll 4
    for (int32_t v = 0; v < kStep * kBlocks; ++v) y[v] = sums(i, v, some);
    finish_batch<kBlocks, kWhole>(y, chain, m + i, some);
  }
}

// sums(i, v, some): vector v of the batch of `some` outputs that begins with output m + i.
template <int kBlocks, class Sums>
[[gnu::always_inline]] inline void finish_chain(const Epilogue& e, int32_t m, int32_t count,
                                                const Sums& sums) {
  if (e.rows == 16 * kBlocks) return finish_batches<kBlocks, true>(e, m, count, sums);
  finish_batches<kBlocks, false>(e, m, count, sums);
}

// sums: [output][block], of outputs m .. m + count - 1, with room for a whole batch
template <int kBlocks>
void finish(const __m512* sums, const Epilogue& e, int32_t m, int32_t count) {
  finish_chain<kBlocks>(e, m, count,
                        [&](int32_t i, int32_t v, int32_t) { return sums[i * kBlocks + v]; });
}

// Whether outputs m .. m + count - 1 may be folded.
[[gnu::always_inline]] inline bool folds(const Epilogue& e, int32_t m, int32_t count) {
  if (!e.fold_scale) return false;
  bool all = true;
  for (int32_t i = m; i < m + count; ++i) all &= e.fold_scale[i] == e.fold_scale[i];
  return all;
}

// What the outputs of a batch take from an array of one value for each.
template <int kBlocks>
[[gnu::always_inline]] inline int32_t output_of(int32_t m, int32_t count, int32_t i) {
  return kBatch<kBlocks> == 1 || i / kBlocks < count ? m + i / kBlocks : m + count - 1;
}

// Sums of an output with its offset.
[[gnu::always_inline]] inline __m512 float_sum(__m512i sums, const Epilogue& e, int32_t m) {
  if (e.offset) sums = _mm512_add_epi32(sums, _mm512_set1_epi32(e.offset[m]));
  return _mm512_cvtepi32_ps(sums);
}

template <int kBlocks>
[[gnu::always_inline]] inline void fold_batch(const __m512i* sums, const Epilogue& e,
                                              const GridVectors& grid, int32_t m, int32_t count) {
  constexpr int32_t kVectors = kBatch<kBlocks> * kBlocks;
  __m512 y[kVectors];
#pragma GCC unroll 4
  for (int32_t i = 0; i < kVectors; ++i) {
    const int32_t o = output_of<kBlocks>(m, count, i);
    y[i] = _mm512_fmadd_ps(float_sum(sums[i], e, o), _mm512_set1_ps(e.fold_scale[o]),
                           _mm512_set1_ps(e.fold_bias[o]));
  }
  store_bytes<kBlocks>(e.q[0].out + m * e.q[0].stride, e.q[0].stride, to_bytes<kVectors>(y, grid),
                       e.rows, count);
}

// Sums with their offsets through the chain, as floats.
template <int kBlocks>
[[gnu::noinline]] void chain_sums(const __m512i* sums, const Epilogue& e, int32_t m,
                                  int32_t count) {
  finish_chain<kBlocks>(e, m, count, [&](int32_t i, int32_t v, int32_t some) {
    return float_sum(sums[i * kBlocks + v], e, output_of<kBlocks>(m + i, some, v));
  });
}

// Sums in registers; `grid` is that of the first quantised output, if there are folded ones.
template <int kBlocks>
[[gnu::always_inline]] inline void finish_sums(const __m512i* sums, const Epilogue& e,
                                               const GridVectors& grid, int32_t m, int32_t count) {
  constexpr int32_t kVectors = kBatch<kBlocks> * kBlocks;
  if (folds(e, m, count)) return fold_batch<kBlocks>(sums, e, grid, m, count);
  __m512i copy[kVectors];
#pragma GCC unroll 4
  for (int32_t i = 0; i < kVectors; ++i) copy[i] = sums[i];
  chain_sums<kBlocks>(copy, e, m, count);
}

template <int kBlocks>
void finish(const __m512i* sums, const Epilogue& e, int32_t m, int32_t count) {
  constexpr int32_t kStep = kBatch<kBlocks>, kVectors = kStep * kBlocks;
  if (!e.fold_scale) return chain_sums<kBlocks>(sums, e, m, count);
  const GridVectors grid = load_grid(e.q[0].grid);
  for (; count > 0; m += kStep, count -= kStep, sums += kVectors) {
    finish_sums<kBlocks>(sums, e, grid, m, count < kStep ? count : kStep);
  }
}

}  // namespace
}  // namespace lutra
