// Order of packed low-bit weights, and how long 16-bit sums of them stay exact. Private to the
// files of the instruction sets, in the anonymous namespace of each.
#pragma once

#include "kernels.h"

namespace lutra {
namespace {

constexpr int32_t kInfinityBits = 0x7f800000;

// What quantising makes of a row that holds NaN or an infinity.
inline float no_row(size_t n, int8_t* q) {
  for (size_t i = 0; i < n; ++i) q[i] = 0;
  return __builtin_nanf("");
}

inline int32_t lowbit_ceil(int32_t a, int32_t b) { return (a + b - 1) / b; }

// --- the dense kernel ---------------------------------------------------------------------------
//
// A code is a field of 1, 2 or 4 bits; a byte has 8, 4 or 2 of them:
//   [group][16 outputs][block][output][4 bytes], zero padded
// A block is 4 x fields weights of each output: field j of byte l is weight 4 j + l of the block.
// So a dword that is shifted by j fields and masked has four neighbouring weights of an output.

inline int32_t field_bits(int32_t levels) { return levels == 2 ? 1 : levels <= 4 ? 2 : 4; }
inline int32_t fields(int32_t levels) { return 8 / field_bits(levels); }
inline int32_t dense_blocks(const LowBitShape& s) {
  return lowbit_ceil(s.group, 4 * fields(s.levels));
}
// Bytes of a group of weights of all outputs.
inline size_t dense_group_bytes(const LowBitShape& s) {
  return static_cast<size_t>(lowbit_ceil(s.outputs, kLowBitOutputs)) * dense_blocks(s) * 64;
}

size_t lowbit_dense_bytes(const LowBitShape& s) {
  return static_cast<size_t>(s.depth / s.group) * dense_group_bytes(s);
}

void pack_lowbit_dense(const LowBitShape& s, const uint8_t* codes, uint8_t* packed) {
  const int32_t bits = field_bits(s.levels), count = fields(s.levels), blocks = dense_blocks(s);
  for (int32_t from = 0; from < s.depth; from += s.group) {
    for (int32_t block = 0; block < s.outputs; block += kLowBitOutputs) {
      for (int32_t b = 0; b < blocks; ++b) {
        for (int32_t i = 0; i < 64; ++i, ++packed) {
          const int32_t m = block + i / 4;
          uint32_t byte = 0;
          for (int32_t j = 0; j < count; ++j) {
            const int32_t k = 4 * count * b + 4 * j + i % 4;
            if (m >= s.outputs || k >= s.group) continue;
            byte |= static_cast<uint32_t>(codes[static_cast<size_t>(m) * s.depth + from + k])
                    << (bits * j);
          }
          *packed = static_cast<uint8_t>(byte);
        }
      }
    }
  }
}

// So many products of a pair of codes and activations add up to at most 2^15 - 1: |x| <= 128.
inline int32_t dense_steps(int32_t levels) { return 32767 / (2 * (levels - 1) * 128); }

// --- the kernel of tables -----------------------------------------------------------------------
//
// A byte is the index of `digits` neighbouring weights in base `levels`, the first one least:
//   [group][tile of bytes][output, padded to 16][byte of the tile], zero padded

inline int32_t middle(int32_t levels) { return levels == 3 ? 1 : levels / 2; }
inline int32_t table_digits(const LowBitShape& s) {
  switch (s.levels) {
    case 2:
      return 6;
    case 3:
      return 4;
    case 4:
      return 3;
    default:
      return 2;
  }
}
// Bytes of a tile: tables that are in the first cache at once, 16 to 33 KiB together.
inline int32_t tile_tables(const LowBitShape& s) {
  switch (s.levels) {
    case 3:
      return 6;
    case 16:
      return 2;
    default:
      return 8;
  }
}
inline int32_t table_tiles(const LowBitShape& s) {
  return lowbit_ceil(lowbit_ceil(s.group, table_digits(s)), tile_tables(s));
}
inline int32_t padded_outputs(const LowBitShape& s) {
  return lowbit_ceil(s.outputs, kLowBitOutputs) * kLowBitOutputs;
}
inline size_t table_group_bytes(const LowBitShape& s) {
  return static_cast<size_t>(table_tiles(s)) * padded_outputs(s) * tile_tables(s);
}

int32_t lowbit_table_depth(const LowBitShape& s) {
  return table_tiles(s) * tile_tables(s) * table_digits(s);
}

size_t lowbit_table_bytes(const LowBitShape& s) {
  return static_cast<size_t>(s.depth / s.group) * table_group_bytes(s);
}

void pack_lowbit_tables(const LowBitShape& s, const uint8_t* codes, uint8_t* packed) {
  const int32_t digits = table_digits(s), tables = tile_tables(s), tiles = table_tiles(s);
  const int32_t outputs = padded_outputs(s);
  for (int32_t from = 0; from < s.depth; from += s.group) {
    for (int32_t tile = 0; tile < tiles; ++tile) {
      for (int32_t m = 0; m < outputs; ++m) {
        for (int32_t t = 0; t < tables; ++t, ++packed) {
          uint32_t index = 0;
          for (int32_t j = digits - 1; j >= 0; --j) {
            const int32_t k = (tile * tables + t) * digits + j;
            const bool there = m < s.outputs && k < s.group;
            index = index * static_cast<uint32_t>(s.levels) +
                    (there ? codes[static_cast<size_t>(m) * s.depth + from + k] : 0u);
          }
          *packed = static_cast<uint8_t>(index);
        }
      }
    }
  }
}

// So many entries of tables add up to at most 2^15 - 1: a weight is -middle..levels - 1 - middle,
// of which -middle is the largest magnitude, and |x| <= 128.
inline int32_t table_steps(const LowBitShape& s) {
  return 32767 / (table_digits(s) * middle(s.levels) * 128);
}

// --- the kernel of tables in registers ----------------------------------------------------------
//
// Four neighbouring bits of a plane are the index of a table of 16 sums of four activations:
//   [group][16 outputs][plane][block of 32 weights][64 bytes], zero padded
// A byte has the index of four weights of an output in its low half, and that of the four weights
// 16 further on in its high half. The order of the 64 bytes is that of the instruction set: byte i
// is of output register_output(i) and of weights 4 t .. 4 t + 3, t = register_table(i) of 0..3.

inline int32_t planes(int32_t levels) {
  return levels == 2 ? 1 : levels <= 4 ? 2 : levels == 8 ? 3 : 4;
}
inline int32_t register_blocks(const LowBitShape& s) { return lowbit_ceil(s.group, 32); }
// Bytes of a plane of 16 outputs.
inline size_t register_plane_bytes(const LowBitShape& s) {
  return static_cast<size_t>(register_blocks(s)) * 64;
}
inline size_t register_group_bytes(const LowBitShape& s) {
  return static_cast<size_t>(lowbit_ceil(s.outputs, kLowBitOutputs)) * planes(s.levels) *
         register_plane_bytes(s);
}

size_t lowbit_register_bytes(const LowBitShape& s) {
  return static_cast<size_t>(s.depth / s.group) * register_group_bytes(s);
}

inline int32_t register_output(int32_t byte);
inline int32_t register_table(int32_t byte);

void pack_lowbit_registers(const LowBitShape& s, const uint8_t* codes, uint8_t* packed) {
  const int32_t blocks = register_blocks(s), count = planes(s.levels);
  for (int32_t from = 0; from < s.depth; from += s.group) {
    for (int32_t block = 0; block < s.outputs; block += kLowBitOutputs) {
      for (int32_t plane = 0; plane < count; ++plane) {
        for (int32_t b = 0; b < blocks; ++b) {
          for (int32_t i = 0; i < 64; ++i, ++packed) {
            const int32_t m = block + register_output(i);
            uint32_t byte = 0;
            for (int32_t j = 0; j < 8; ++j) {
              const int32_t k = 32 * b + 16 * (j / 4) + 4 * register_table(i) + j % 4;
              if (m >= s.outputs || k >= s.group) continue;
              const uint32_t code = codes[static_cast<size_t>(m) * s.depth + from + k];
              byte |= (code >> plane & 1u) << j;
            }
            *packed = static_cast<uint8_t>(byte);
          }
        }
      }
    }
  }
}

// Bytes of the tables of 16 weights, which are those of a row of activations: 4 x 16 low bytes and
// as many high ones.
constexpr size_t kRegisterTables = 128;
inline size_t register_row_bytes(const LowBitShape& s) {
  return static_cast<size_t>(register_blocks(s)) * 2 * kRegisterTables;
}

size_t lowbit_register_scratch_bytes(const LowBitShape& s, int32_t rows) {
  return static_cast<size_t>(rows) * register_row_bytes(s);
}

}  // namespace
}  // namespace lutra
