// NEON: sums of table entries. Private to neon.cc and neon_dot.cc.
//
// K = 8 and 16: a tbl of one or two registers reads two codebooks at the pairs of codes of 8 rows,
// and sadalp adds each pair of bytes to a sum of 16 bits: two instructions for 16 lookups.
// K = 32 and 64: a tbl of two or four registers reads one codebook for 16 rows, and saddw, saddw2
// add the bytes to sums of 16 bits. Either way 4 outputs share the loads of codes, 32 rows those of
// tables, and all sums are in registers. They are exact: 16 bits hold 256 entries.
//
// Packed tables: [4 outputs][unit][output][bytes of the unit], a unit being a pair of codebooks or
// a codebook.
#pragma once

#include "neon_encode.h"

namespace lutra {
namespace {

constexpr int32_t kUnitEntries = 256;  // entries of one row that 16 bits hold, at least

LUTRA_INLINE int32_t units_of(const PqShape& s) {
  return code_pairs(s) ? (s.codebooks + 1) / 2 : s.codebooks;
}
LUTRA_INLINE size_t unit_bytes(const PqShape& s) {
  return static_cast<size_t>(code_pairs(s) ? 2 * s.centroids : s.centroids);
}
LUTRA_INLINE size_t output_block_bytes(const PqShape& s) {
  return units_of(s) * unit_bytes(s) * kOutputs;
}

size_t table_bytes(const PqShape& s) {
  return static_cast<size_t>((s.outputs + kOutputs - 1) / kOutputs) * output_block_bytes(s);
}

void pack_tables(const PqShape& s, const int8_t* tables, uint8_t* packed) {
  const int32_t books = code_pairs(s) ? 2 : 1;  // of a unit
  for (int32_t block = 0; block < s.outputs; block += kOutputs) {
    for (int32_t first = 0; first < units_of(s) * books; first += books) {
      for (int32_t m = block; m < block + kOutputs; ++m) {
        for (int32_t b = first; b < first + books; ++b) {
          for (int32_t k = 0; k < s.centroids; ++k) {
            const size_t row = static_cast<size_t>(b) * s.centroids + k;
            const bool there = m < s.outputs && b < s.codebooks;
            *packed++ = there ? static_cast<uint8_t>(tables[row * s.outputs + m]) : uint8_t{0};
          }
        }
      }
    }
  }
}

// The entries of a unit at codes of 16 bytes.
template <int kBytes>
struct Entry;
template <>
struct Entry<16> {
  int8x16_t t;
  LUTRA_INLINE explicit Entry(const int8_t* p) : t(vld1q_s8(p)) {}
  LUTRA_INLINE int8x16_t at(uint8x16_t code) const { return vqtbl1q_s8(t, code); }
};
template <>
struct Entry<32> {
  int8x16x2_t t;
  LUTRA_INLINE explicit Entry(const int8_t* p) : t{{vld1q_s8(p), vld1q_s8(p + 16)}} {}
  LUTRA_INLINE int8x16_t at(uint8x16_t code) const { return vqtbl2q_s8(t, code); }
};
template <>
struct Entry<64> {
  int8x16x4_t t;
  LUTRA_INLINE explicit Entry(const int8_t* p)
      : t{{vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)}} {}
  LUTRA_INLINE int8x16_t at(uint8x16_t code) const { return vqtbl4q_s8(t, code); }
};

// Adds `units` units to sums of 4 outputs x kBlocks x 16 rows; codes of the blocks are `stride`
// bytes apart.
template <bool kPairs, int kBytes, int kBlocks>
LUTRA_INLINE void add_units(const uint8_t* tables, const uint8_t* codes, size_t stride,
                            int32_t units, int16x8_t (*sum)[kBlocks][2]) {
  const int8_t* t = reinterpret_cast<const int8_t*>(tables);
  for (; units > 0; --units, t += kOutputs * kBytes, codes += (kPairs ? 2 : 1) * kBlock) {
    uint8x16_t code[kBlocks][2];
    for (int32_t i = 0; i < kBlocks; ++i) {
      code[i][0] = vld1q_u8(codes + i * stride);
      if (kPairs) code[i][1] = vld1q_u8(codes + i * stride + kBlock);
    }
    for (int32_t j = 0; j < kOutputs; ++j) {
      const Entry<kBytes> entry(t + j * kBytes);
      for (int32_t i = 0; i < kBlocks; ++i) {
        if constexpr (kPairs) {
          sum[j][i][0] = vpadalq_s8(sum[j][i][0], entry.at(code[i][0]));
          sum[j][i][1] = vpadalq_s8(sum[j][i][1], entry.at(code[i][1]));
        } else {
          const int8x16_t v = entry.at(code[i][0]);
          sum[j][i][0] = vaddw_s8(sum[j][i][0], vget_low_s8(v));
          sum[j][i][1] = vaddw_high_s8(sum[j][i][1], v);
        }
      }
    }
  }
}

// Outputs m.. of a block, kBlocks blocks of rows from `row`.
template <bool kPairs, int kBytes, int kBlocks>
[[gnu::noinline]] void lookup_block(const PqShape& s, const uint8_t* tables, const uint8_t* codes,
                                    int32_t m, int32_t last, int32_t row, const Finish& finish) {
  constexpr int32_t kUnits = kPairs ? kUnitEntries / 2 : kUnitEntries;
  const int32_t units = units_of(s);
  int32x4_t total[kOutputs][kBlocks][4];
  for (auto& output : total) {
    for (auto& block : output) block[0] = block[1] = block[2] = block[3] = vdupq_n_s32(0);
  }
  for (int32_t u = 0; u < units; u += kUnits) {
    int16x8_t sum[kOutputs][kBlocks][2];
    for (auto& output : sum) {
      for (auto& block : output) block[0] = block[1] = vdupq_n_s16(0);
    }
    add_units<kPairs, kBytes, kBlocks>(tables + u * static_cast<size_t>(kOutputs * kBytes),
                                       codes + u * ((kPairs ? 2 : 1) * kBlock), block_bytes(s),
                                       units - u < kUnits ? units - u : kUnits, sum);
    for (int32_t j = 0; j < kOutputs; ++j) {
      for (int32_t i = 0; i < kBlocks; ++i) add_words(sum[j][i][0], sum[j][i][1], total[j][i]);
    }
  }
  for (int32_t j = 0; j < kOutputs && m + j < last; ++j) {
    for (int32_t i = 0; i < kBlocks; ++i) finish.sums(m + j, row + i * kBlock, 0, total[j][i]);
  }
}

template <bool kPairs, int kBytes>
void lookup_outputs(const PqShape& s, const uint8_t* tables, const uint8_t* codes, int32_t first,
                    int32_t last, const Epilogue& e) {
  const Finish finish(e);
  for (int32_t m = first; m < last; m += kOutputs) {
    const uint8_t* const from = tables + m / kOutputs * output_block_bytes(s);
    const int32_t blocks = blocks_of(e.rows);
    int32_t i = 0;
    for (; i + 2 <= blocks; i += 2) {
      lookup_block<kPairs, kBytes, 2>(s, from, codes + i * block_bytes(s), m, last, i * kBlock,
                                      finish);
    }
    if (i < blocks) {
      lookup_block<kPairs, kBytes, 1>(s, from, codes + i * block_bytes(s), m, last, i * kBlock,
                                      finish);
    }
  }
}

void lookup(const PqShape& s, const uint8_t* tables, const uint8_t* codes, int32_t first,
            int32_t last, const Epilogue& e) {
  auto* const run = s.centroids == 8    ? lookup_outputs<true, 16>
                    : s.centroids == 16 ? lookup_outputs<true, 32>
                    : s.centroids == 32 ? lookup_outputs<false, 32>
                                        : lookup_outputs<false, 64>;
  run(s, tables, codes, first, last, e);
}

// --- one row -------------------------------------------------------------------------------------
//
// Bound by memory: each code selects a row of M bytes. Eight codebooks are walked together, outputs
// in the lanes, and the rows of the next eight are fetched meanwhile.

constexpr int32_t kRowBooks = 8;

// sums[0..15] += rows[0..count-1][at..at+15]
LUTRA_INLINE void add_rows(const int8_t* const* rows, int32_t count, int32_t at, int32_t* sums) {
  int16x8_t low = vdupq_n_s16(0), high = low;
  for (int32_t i = 0; i < count; ++i) {
    const int8x16_t v = vld1q_s8(rows[i] + at);
    low = vaddw_s8(low, vget_low_s8(v));
    high = vaddw_high_s8(high, v);
  }
  int32x4_t total[4];
  for (int32_t i = 0; i < 4; ++i) total[i] = vld1q_s32(sums + 4 * i);
  add_words(low, high, total);
  for (int32_t i = 0; i < 4; ++i) vst1q_s32(sums + 4 * i, total[i]);
}

void lookup_row(const PqShape& s, const int8_t* tables, const uint8_t* codes, int32_t first,
                int32_t last, int32_t* sums) {
  const int32_t count = last - first;
  const size_t codebook = static_cast<size_t>(s.centroids) * s.outputs;
  for (int32_t m = 0; m < count; ++m) sums[m] = 0;
  tables += first;
  for (int32_t b = 0; b < s.codebooks; b += kRowBooks) {
    const int32_t books = s.codebooks - b < kRowBooks ? s.codebooks - b : kRowBooks;
    const int8_t *rows[kRowBooks], *later[kRowBooks];
    for (int32_t i = 0; i < books; ++i) {
      const int32_t next = b + i + kRowBooks < s.codebooks ? b + i + kRowBooks : b + i;
      rows[i] = tables + (b + i) * codebook + static_cast<size_t>(codes[b + i]) * s.outputs;
      later[i] = tables + next * codebook + static_cast<size_t>(codes[next]) * s.outputs;
    }
    int32_t m = 0;
    for (; m + 16 <= count; m += 16) {
      for (int32_t i = 0; m % 64 == 0 && i < books; ++i) __builtin_prefetch(later[i] + m);
      if (books == kRowBooks) {
        add_rows(rows, kRowBooks, m, sums + m);
      } else {
        add_rows(rows, books, m, sums + m);
      }
    }
    for (; m < count; ++m) {
      for (int32_t i = 0; i < books; ++i) sums[m] += rows[i][m];
    }
  }
}

}  // namespace
}  // namespace lutra
