// Products of few rows with low-bit weights by lookups in registers (T-MAC, arXiv 2407.00088).
// Private to neon.cc and neon_dot.cc; lowbit.h has the order of packed weights.
//
// tbl reads, for each of 16 outputs, an entry of a table of 16 bytes, which is of four weights. An
// entry is a 16-bit sum in two tables: of low and of high bytes, which zip makes words of. For 32
// weights of 16 outputs that is four loads of indices and sixteen of tables, twelve instructions
// for indices, and sixteen tbl, zip and add each; no multiplier.
#pragma once

#include "neon_lowbit.h"

namespace lutra {
namespace {

// A register of 16 bytes has an index of each output.
inline int32_t register_output(int32_t byte) { return byte % 16; }
inline int32_t register_table(int32_t byte) { return byte / 16; }

// Of 16 weights: low and high bytes of each of four tables. Entry n is the sum of the activations
// whose bit in n is set.
void build_register_tables(const int8_t* x, int32_t weights, uint8_t* tables) {
  for (int32_t k = 0; k < weights; k += 4, tables += 32) {
    // Entries 2^j .. 2^(j + 1) - 1 are those before and x[j].
    int16_t entry[16];
    entry[0] = 0;
    for (int32_t j = 0; j < 4; ++j) {
      for (int32_t n = 0; n < 1 << j; ++n) {
        entry[(1 << j) + n] = static_cast<int16_t>(entry[n] + x[k + j]);
      }
    }
    const uint8x16_t a = vreinterpretq_u8_s16(vld1q_s16(entry));
    const uint8x16_t b = vreinterpretq_u8_s16(vld1q_s16(entry + 8));
    vst1q_u8(tables, vuzp1q_u8(a, b));
    vst1q_u8(tables + 16, vuzp2q_u8(a, b));
  }
}

// So many blocks of 32 weights add up to 16-bit sums that fit: an entry is -512..508, and a lane
// gets eight of them.
constexpr int32_t kRegisterSteps = 32767 / (8 * 512);

LUTRA_INLINE void look_up(uint8x16_t index, const uint8_t* table, int16x8_t* sum) {
  const uint8x16_t low = vqtbl1q_u8(vld1q_u8(table), index);
  const uint8x16_t high = vqtbl1q_u8(vld1q_u8(table + 16), index);
  sum[0] = vaddq_s16(sum[0], vreinterpretq_s16_u8(vzip1q_u8(low, high)));
  sum[1] = vaddq_s16(sum[1], vreinterpretq_s16_u8(vzip2q_u8(low, high)));
}

// Sums of a plane of 16 outputs.
LUTRA_INLINE void look_up_plane(int32_t blocks, const uint8_t* weights, const uint8_t* tables,
                                int32x4_t (&out)[4]) {
  for (int32x4_t& total : out) total = vdupq_n_s32(0);
  while (blocks > 0) {
    const int32_t count = blocks < kRegisterSteps ? blocks : kRegisterSteps;
    blocks -= count;
    int16x8_t sum[2] = {vdupq_n_s16(0), vdupq_n_s16(0)};
    for (int32_t b = 0; b < count; ++b, weights += 64, tables += 2 * kRegisterTables) {
#pragma GCC unroll 4
      for (int32_t t = 0; t < 4; ++t) {
        const uint8x16_t byte = vld1q_u8(weights + 16 * t);
        look_up(vandq_u8(byte, vdupq_n_u8(15)), tables + 32 * t, sum);
        look_up(vshrq_n_u8(byte, 4), tables + kRegisterTables + 32 * t, sum);
      }
    }
    add_words(sum[0], sum[1], out);
  }
}

void lowbit_registers(const LowBitShape& s, const uint8_t* packed, int32_t group, const int8_t* x,
                      int32_t rows, int32_t first, int32_t last, int32_t* sums, size_t stride,
                      uint8_t* scratch) {
  const int32_t blocks = register_blocks(s), padded = blocks * 32, count = planes(s.levels);
  const size_t row_bytes = register_row_bytes(s), plane_bytes = register_plane_bytes(s);
  for (int32_t r = 0; r < rows; ++r) {
    build_register_tables(x + static_cast<size_t>(r) * padded, padded, scratch + r * row_bytes);
  }
  packed += static_cast<size_t>(group) * register_group_bytes(s) +
            static_cast<size_t>(first / kLowBitOutputs) * count * plane_bytes;
  for (int32_t m = first; m < last; m += kLowBitOutputs, packed += count * plane_bytes) {
    for (int32_t r = 0; r < rows; ++r) {
      int32x4_t total[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
      for (int32_t p = 0; p < count; ++p) {
        int32x4_t sum[4];
        look_up_plane(blocks, packed + p * plane_bytes, scratch + r * row_bytes, sum);
        for (int32_t i = 0; i < 4; ++i) {
          total[i] = vaddq_s32(total[i], vshlq_s32(sum[i], vdupq_n_s32(p)));
        }
      }
      store_sums(sums + r * stride + (m - first), total, last - m);
    }
  }
}

}  // namespace
}  // namespace lutra
