// Convolutions in int8 that read their activations where they are. Private to avx512.cc.
#pragma once

#include "avx512_few_rows.h"

namespace lutra {
namespace {

// A pixel's four channels are a dword, so that 16 neighbouring rows are one load at any tap, the
// operand of vpdpbusd. Sums as in dense8(): 4 outputs of 64 rows, 8 of 32, 16 of 16.
//
// Packed: [block of 16 outputs][plane][tap][output][4 channels], zero padded. Copies, where rows
// that share a register are not neighbours (small maps): offsets of taps, then [plane][tap][block
// of 16 rows][64 bytes].

constexpr int32_t kConvBlock = 16;  // outputs

int32_t planes_of(const Conv8Shape& s) { return ceil_div(s.channels, 4); }

size_t conv8_bytes(const Conv8Shape& s) {
  return static_cast<size_t>(ceil_div(s.outputs, kConvBlock)) * planes_of(s) * s.taps * 64;
}

void pack_conv8(const Conv8Shape& s, const int8_t* weights, uint8_t* packed) {
  for (int32_t block = 0; block < s.outputs; block += kConvBlock) {
    for (int32_t i = 0; i < planes_of(s) * s.taps; ++i) {
      for (int32_t j = 0; j < 64; ++j, ++packed) {
        const int32_t m = block + j / 4, c = i / s.taps * 4 + j % 4;
        const size_t at = (static_cast<size_t>(m) * s.channels + c) * s.taps + i % s.taps;
        *packed = m < s.outputs && c < s.channels ? static_cast<uint8_t>(weights[at]) : 0;
      }
    }
  }
}

// Rows are ascending, and no two are the same.
bool in_place(const Patch& p) {
  for (int32_t row = 0; row < p.rows; row += 16) {
    const int32_t last = p.rows - row < 16 ? p.rows - row - 1 : 15;
    if (p.row[row + last] - p.row[row] != 4 * last) return false;
  }
  return true;
}

size_t tap_bytes(const Conv8Shape& s) { return static_cast<size_t>(ceil_div(s.taps, 16)) * 64; }
size_t conv8_copy_bytes(const Conv8Shape& s) {
  return tap_bytes(s) + static_cast<size_t>(planes_of(s)) * s.taps * kRows * 4;
}

// The lines that 16 rows are of, each a load under a mask.
struct SixteenRows {
  int32_t lines = 0;
  int32_t offset[16];  // of lane 0
  __mmask16 lanes[16];

  SixteenRows(const Patch& p, int32_t first) {
    for (int32_t i = 0; i < 16 && first + i < p.rows; ++i) {
      const int32_t at = p.row[first + i] - 4 * i;
      if (lines == 0 || at != offset[lines - 1]) {
        offset[lines] = at;
        lanes[lines++] = 0;
      }
      lanes[lines - 1] = static_cast<__mmask16>(lanes[lines - 1] | 1u << i);
    }
  }
  [[gnu::always_inline]] __m512i load(const uint8_t* from) const {
    __m512i v = _mm512_maskz_loadu_epi32(lanes[0], from + offset[0]);
    for (int32_t i = 1; i < lines; ++i) v = _mm512_mask_loadu_epi32(v, lanes[i], from + offset[i]);
    return v;
  }
};

void copy_conv8(const Conv8Shape& s, const Patch& p, uint8_t* copies) {
  if (in_place(p)) return;
  const int32_t step = row_blocks(p.rows) * 64;
  int32_t* const taps = reinterpret_cast<int32_t*>(copies);
  for (int32_t t = 0; t < s.taps; ++t) taps[t] = t * step;
  for (int32_t row = 0; row < p.rows; row += 16) {
    const SixteenRows rows(p, row);
    uint8_t* to = copies + tap_bytes(s) + 4 * row;
    for (int32_t i = 0; i < planes_of(s); ++i) {
      for (int32_t t = 0; t < s.taps; ++t, to += step) {
        _mm512_storeu_si512(to, rows.load(p.planes + i * p.plane + p.tap[t]));
      }
    }
  }
}

// Where the taps of a tile are.
struct ConvSource {
  const uint8_t* block[4];  // of 16 rows
  int64_t plane;
  const int32_t* tap;
  int32_t planes, taps;
};

// kCount outputs of all rows. Limited by vpdpbusd: 16 of them for 4 + 4 loads.
template <int kBlocks, int kCount>
[[gnu::always_inline]] inline void conv8_outputs(const ConvSource& source, const uint8_t* weights,
                                                 int32_t m, int32_t count, const Epilogue& e,
                                                 const GridVectors& grid) {
  __m512i sum[kCount * kBlocks];
#pragma GCC unroll 16
  for (int32_t i = 0; i < kCount * kBlocks; ++i) sum[i] = _mm512_setzero_si512();
  const uint8_t* x[kBlocks];
#pragma GCC unroll 16
  for (int32_t i = 0; i < kBlocks; ++i) x[i] = source.block[i];
  for (int32_t plane = 0; plane < source.planes; ++plane) {
    for (int32_t t = 0; t < source.taps; ++t, weights += 64) {
      __m512i q[kBlocks];
#pragma GCC unroll 16
      for (int32_t i = 0; i < kBlocks; ++i) q[i] = _mm512_loadu_si512(x[i] + source.tap[t]);
#pragma GCC unroll 16
      for (int32_t o = 0; o < kCount; ++o) {
        const __m512i w = _mm512_set1_epi32(reinterpret_cast<const int32_t*>(weights)[o]);
#pragma GCC unroll 16
        for (int32_t i = 0; i < kBlocks; ++i) {
          sum[o * kBlocks + i] = _mm512_dpbusd_epi32(sum[o * kBlocks + i], q[i], w);
        }
      }
    }
#pragma GCC unroll 16
    for (int32_t i = 0; i < kBlocks; ++i) x[i] += source.plane;
  }
  constexpr int32_t kStep = kBatch<kBlocks>;
#pragma GCC unroll 16
  for (int32_t o = 0; o < kCount; o += kStep) {
    const int32_t left = count - o < kStep ? count - o : kStep;
    if (left > 0) finish_sums<kBlocks>(sum + o * kBlocks, e, grid, m + o, left);
  }
}

template <int kBlocks, int kCount>
void conv8_range(const ConvSource& source, const uint8_t* packed, int32_t first, int32_t last,
                 const Epilogue& e) {
  GridVectors grid;
  if (e.fold_scale) grid = load_grid(e.q[0].grid);
  for (int32_t m = first; m < last; m += kCount) {
    const size_t block = static_cast<size_t>(m / kConvBlock) * source.planes * source.taps * 64;
    const int32_t left = last - m < kCount ? last - m : kCount;
    conv8_outputs<kBlocks, kCount>(source, packed + block + m % kConvBlock * 4, m, left, e, grid);
  }
}

void conv8(const Conv8Shape& s, const uint8_t* packed, const Patch& p, uint8_t* copies,
           int32_t first, int32_t last, const Epilogue& e) {
  const int32_t blocks = row_blocks(e.rows);
  const bool direct = in_place(p);
  ConvSource source{{},
                    direct ? p.plane : int64_t{blocks} * 64 * s.taps,
                    direct ? p.tap : reinterpret_cast<const int32_t*>(copies),
                    planes_of(s),
                    s.taps};
  for (int32_t i = 0; i < blocks; ++i) {
    source.block[i] = direct ? p.planes + p.row[16 * i] : copies + tap_bytes(s) + 64 * i;
  }
  const FewRows few(e.rows, source.planes * s.taps, first);
  const Epilogue before = few.before(e);
  switch (few.blocks) {
    case 0:
      break;
    case 1:
      conv8_range<1, 16>(source, packed, first, last, before);
      break;
    case 2:
      conv8_range<2, 8>(source, packed, first, last, before);
      break;
    case 3:
      conv8_range<3, 4>(source, packed, first, last, before);
      break;
    default:
      conv8_range<4, 4>(source, packed, first, last, before);
  }
  if (few.rows == 0) return;
  const Quads quads{source.block[few.blocks], source.plane, source.tap, source.planes, s.taps};
  few_rows(quads, packed, first, last, few.rows, few.after(e));
}

}  // namespace
}  // namespace lutra
