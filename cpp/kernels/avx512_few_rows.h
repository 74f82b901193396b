// int8 products of a few rows, with the outputs in the lanes. Private to avx512.cc.
//
// Sixteen rows fill a register of dwords. The 3x3, 6x6 and 7x7 maps at the end of networks leave 9,
// 4 and 1 rows of the last register; those are multiplied with 16 outputs in a register, and the
// sums are turned around for the epilogue.
#pragma once

#include "avx512_common.h"

namespace lutra {
namespace {

// Quads of four activations: that of row r for plane p and tap t is at `at + p * plane + tap[t] +
// 4 * r`.
struct Quads {
  const uint8_t* at;
  int64_t plane;
  const int32_t* tap;
  int32_t planes, taps;
};

// How the rows of a tile are shared between the kernels: `blocks` whole blocks of 16 and `rows`
// more, or everything in blocks where turning sums around costs more than empty lanes do.
struct FewRows {
  int32_t blocks, rows;

  FewRows(int32_t all, int32_t quads, int32_t first_output) {
    constexpr int32_t kMost = 12, kTurn = 96;  // vpdpbusd that a turn of 16 outputs is worth
    blocks = row_blocks(all);
    rows = all - 16 * (blocks - 1);
    if (rows <= kMost && (16 - rows) * quads >= kTurn && first_output % 16 == 0) {
      --blocks;
    } else {
      rows = 0;
    }
  }
  Epilogue before(Epilogue e) const {
    if (rows > 0) e.rows = 16 * blocks;
    return e;
  }
  Epilogue after(Epilogue e) const {
    const int32_t skip = 16 * blocks;
    e.rows = rows;
    if (e.residual) e.residual += skip;
    if (e.out) e.out += skip;
    for (int32_t i = 0; i < e.quantized; ++i) e.q[i].out += skip;
    return e;
  }
};

// x[row]: lanes are columns -> x[column]: lanes are rows
void turn(__m512i* x) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int32_t i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  // b[4 g + c], lane l of 128 bits: column 4 l + c of rows 4 g .. 4 g + 3
#pragma GCC unroll 4
  for (int32_t i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int32_t c = 0; c < 4; ++c) {
    const __m512i lo01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x44);
    const __m512i hi01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xee);
    const __m512i lo23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x44);
    const __m512i hi23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xee);
    x[c] = _mm512_shuffle_i32x4(lo01, lo23, 0x88);
    x[4 + c] = _mm512_shuffle_i32x4(lo01, lo23, 0xdd);
    x[8 + c] = _mm512_shuffle_i32x4(hi01, hi23, 0x88);
    x[12 + c] = _mm512_shuffle_i32x4(hi01, hi23, 0xdd);
  }
}

// 16 kVectors outputs from m on, of which `count` are there. `block`: bytes between the weights of
// 16 outputs and the next 16.
template <int kCount, int kVectors>
void few_outputs(const Quads& quads, const uint8_t* weights, size_t block, int32_t m, int32_t count,
                 const Epilogue& e) {
  __m512i sum[kVectors * kCount];
#pragma GCC unroll 32
  for (int32_t i = 0; i < kVectors * kCount; ++i) sum[i] = _mm512_setzero_si512();
  const uint8_t* at = quads.at;
  for (int32_t p = 0; p < quads.planes; ++p, at += quads.plane) {
    for (int32_t t = 0; t < quads.taps; ++t, weights += 64) {
      const int32_t* const x = reinterpret_cast<const int32_t*>(at + quads.tap[t]);
      __m512i w[kVectors];
#pragma GCC unroll 4
      for (int32_t v = 0; v < kVectors; ++v) w[v] = _mm512_loadu_si512(weights + v * block);
#pragma GCC unroll 16
      for (int32_t r = 0; r < kCount; ++r) {
        const __m512i q = _mm512_set1_epi32(x[r]);
#pragma GCC unroll 4
        for (int32_t v = 0; v < kVectors; ++v) {
          sum[v * kCount + r] = _mm512_dpbusd_epi32(sum[v * kCount + r], q, w[v]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int32_t v = 0; v < kVectors; ++v) {
    __m512i turned[16];
#pragma GCC unroll 16
    for (int32_t r = 0; r < 16; ++r) {
      turned[r] = r < kCount ? sum[v * kCount + r] : _mm512_setzero_si512();
    }
    turn(turned);
    const int32_t left = count - 16 * v;
    if (left > 0) finish<1>(turned, e, m + 16 * v, left < 16 ? left : 16);
  }
}

// Enough sums for the latency of vpdpbusd, and not more than there are registers.
template <int kCount>
void few_range(const Quads& quads, const uint8_t* packed, int32_t first, int32_t last,
               const Epilogue& e) {
  constexpr int32_t kVectors = kCount <= 2 ? 4 : 2;
  const size_t block = static_cast<size_t>(quads.planes) * quads.taps * 64;
  for (int32_t m = first; m < last;) {
    const uint8_t* const weights = packed + static_cast<size_t>(m / 16) * block;
    if (last - m > 16 * (kVectors - 1)) {
      few_outputs<kCount, kVectors>(quads, weights, block, m, last - m, e);
      m += 16 * kVectors;
    } else {
      few_outputs<kCount, 1>(quads, weights, block, m, last - m, e);
      m += 16;
    }
  }
}

// Outputs first..last-1, where `first` is a multiple of 16, of 1 to 12 rows; packed weights:
// [block of 16 outputs][plane][tap][output][4 bytes].
void few_rows(const Quads& quads, const uint8_t* packed, int32_t first, int32_t last, int32_t rows,
              const Epilogue& e) {
  using Kernel = void (*)(const Quads&, const uint8_t*, int32_t, int32_t, const Epilogue&);
  constexpr Kernel kernels[] = {few_range<1>, few_range<2>,  few_range<3>,  few_range<4>,
                                few_range<5>, few_range<6>,  few_range<7>,  few_range<8>,
                                few_range<9>, few_range<10>, few_range<11>, few_range<12>};
  kernels[rows - 1](quads, packed, first, last, e);
}

}  // namespace
}  // namespace lutra
