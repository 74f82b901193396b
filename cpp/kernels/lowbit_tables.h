// Lookups of low-bit weights whose entries are vectors over rows (Vec-LUT, arXiv 2512.06443).
// Included by the files of the instruction sets after their own parts, which have Words (a register
// of 16-bit lanes), load_words, store_words, add_words, widen_bytes and flush_words, and Dwords (a
// register of sums) with load_dwords, no_dwords, store_dwords and transpose_square.
#pragma once

#include "lowbit.h"

namespace lutra {
namespace {

constexpr int32_t kTableParts = kTableRows / kWordLanes;  // registers of an entry
constexpr int32_t kTableCall = 2048;  // outputs whose sums stay in the second cache

constexpr int32_t power(int32_t base, int32_t exponent) {
  return exponent == 0 ? 1 : base * power(base, exponent - 1);
}

// Entry e = sum over j of digit[j] levels^j of a table is, for each of 32 rows,
//   sum over j of (digit[j] - middle) * x[j][row]
// Every entry but the first is one addition away from an earlier one: entries of j + 1 digits
// are those of j digits, and levels - 1 times the entry `levels^j` before plus x[j].
template <int kLevels, int kDigits>
LUTRA_INLINE void build_table(const int8_t* x, int16_t* table) {
  constexpr int32_t kMiddle = kLevels == 3 ? 1 : kLevels / 2;
  Words value[kDigits][kTableParts], start[kTableParts];
#pragma GCC unroll 8
  for (int32_t j = 0; j < kDigits; ++j) {
#pragma GCC unroll 4
    for (int32_t p = 0; p < kTableParts; ++p) {
      value[j][p] = widen_bytes(x + j * kTableRows + p * kWordLanes);
      Words least = value[j][p];
#pragma GCC unroll 3
      for (int32_t twice = 1; twice < kMiddle; twice *= 2) least = add_words(least, least);
      start[p] = j == 0 ? sub_words(least, add_words(least, least)) : sub_words(start[p], least);
    }
  }
#pragma GCC unroll 4
  for (int32_t p = 0; p < kTableParts; ++p) store_words(table + p * kWordLanes, start[p]);
  int32_t size = 1;
#pragma GCC unroll 8
  for (int32_t j = 0; j < kDigits; ++j) {
    const int32_t end = size * kLevels;
    for (int32_t e = size; e < end; ++e) {
#pragma GCC unroll 4
      for (int32_t p = 0; p < kTableParts; ++p) {
        const Words before = load_words(table + (e - size) * kTableRows + p * kWordLanes);
        store_words(table + e * kTableRows + p * kWordLanes, add_words(before, value[j][p]));
      }
    }
    size = end;
  }
}

// sum[m] += an entry of each of kTables tables, for all outputs of a call. A register is loaded,
// gets kTables entries and is stored, so what limits is loads: an index, the entry, and 1 / kTables
// of a sum. With kFresh the sums begin; with kFlush they go to the 32-bit sums.
template <int kTables, int kEntries, bool kFresh, bool kFlush>
void add_entries(const uint8_t* index, int32_t outputs, const int16_t* tables, int16_t* sum,
                 int32_t* total, bool first) {
  for (int32_t m = 0; m < outputs; ++m, index += kTables, sum += kTableRows, total += kTableRows) {
    Words s[kTableParts];
#pragma GCC unroll 8
    for (int32_t t = 0; t < kTables; ++t) {
      const int16_t* const entry =
          tables + t * (kEntries * kTableRows) + static_cast<size_t>(index[t]) * kTableRows;
#pragma GCC unroll 4
      for (int32_t p = 0; p < kTableParts; ++p) {
        const Words v = load_words(entry + p * kWordLanes);
        if (t > 0) {
          s[p] = add_words(s[p], v);
        } else {
          s[p] = kFresh ? v : add_words(load_words(sum + p * kWordLanes), v);
        }
      }
    }
#pragma GCC unroll 4
    for (int32_t p = 0; p < kTableParts; ++p) {
      if constexpr (kFlush) {
        flush_words(s[p], total + p * kWordLanes, first);
      } else {
        store_words(sum + p * kWordLanes, s[p]);
      }
    }
  }
}

template <int kLevels, int kDigits, int kTables>
void add_tables(const LowBitShape& s, const uint8_t* index, const int8_t* x, int32_t outputs,
                uint8_t* scratch) {
  constexpr int32_t kEntries = power(kLevels, kDigits);
  const int32_t tiles = table_tiles(s), most = table_steps(s) / kTables;
  const size_t tile_bytes = static_cast<size_t>(padded_outputs(s)) * kTables;
  int16_t* const tables = reinterpret_cast<int16_t*>(scratch);
  int32_t* const total = reinterpret_cast<int32_t*>(tables + kTables * kEntries * kTableRows);
  int16_t* const sum =
      reinterpret_cast<int16_t*>(total + static_cast<size_t>(outputs) * kTableRows);
  int32_t since = 0;
  bool first = true;
  for (int32_t tile = 0; tile < tiles; ++tile, index += tile_bytes) {
#pragma GCC unroll 8
    for (int32_t t = 0; t < kTables; ++t, x += kDigits * kTableRows) {
      build_table<kLevels, kDigits>(x, tables + t * (kEntries * kTableRows));
    }
    const bool fresh = since == 0, flush = ++since == most || tile + 1 == tiles;
    const auto add = fresh ? (flush ? add_entries<kTables, kEntries, true, true>
                                    : add_entries<kTables, kEntries, true, false>)
                           : (flush ? add_entries<kTables, kEntries, false, true>
                                    : add_entries<kTables, kEntries, false, false>);
    add(index, outputs, tables, sum, total, first);
    if (flush) {
      since = 0;
      first = false;
    }
  }
}

// sums[r * stride + m] = total[m * kTableRows + r], for r < rows
void transpose_sums(const int32_t* total, int32_t outputs, int32_t rows, int32_t* sums,
                    size_t stride) {
  for (int32_t m = 0; m < outputs; m += kSquare) {
    const int32_t left = outputs - m < kSquare ? outputs - m : kSquare;
    for (int32_t r = 0; r < rows; r += kSquare) {
      Dwords a[kSquare];
#pragma GCC unroll 16
      for (int32_t i = 0; i < kSquare; ++i) {
        a[i] = i < left ? load_dwords(total + static_cast<size_t>(m + i) * kTableRows + r)
                        : no_dwords();
      }
      transpose_square(a);
#pragma GCC unroll 16
      for (int32_t i = 0; i < kSquare; ++i) {
        if (r + i < rows) store_dwords(sums + (r + i) * stride + m, left, a[i]);
      }
    }
  }
}

size_t lowbit_scratch_bytes(const LowBitShape& s, int32_t outputs) {
  const int32_t entries = power(s.levels, table_digits(s));
  const int32_t most = outputs < kTableCall ? outputs : kTableCall;
  return static_cast<size_t>(tile_tables(s)) * entries * kTableRows * 2 +
         static_cast<size_t>(most) * kTableRows * 6;
}

void lowbit_tables(const LowBitShape& s, const uint8_t* packed, int32_t group, const int8_t* x,
                   int32_t rows, int32_t first, int32_t last, int32_t* sums, size_t stride,
                   uint8_t* scratch) {
  const size_t tables = static_cast<size_t>(tile_tables(s)) * power(s.levels, table_digits(s));
  const int32_t* const total =
      reinterpret_cast<const int32_t*>(scratch + tables * kTableRows * sizeof(int16_t));
  packed += static_cast<size_t>(group) * table_group_bytes(s);
  for (int32_t from = first; from < last; from += kTableCall) {
    const int32_t outputs = last - from < kTableCall ? last - from : kTableCall;
    const uint8_t* const index = packed + static_cast<size_t>(from) * tile_tables(s);
    switch (s.levels) {
      case 2:
        add_tables<2, 6, 8>(s, index, x, outputs, scratch);
        break;
      case 3:
        add_tables<3, 4, 6>(s, index, x, outputs, scratch);
        break;
      case 4:
        add_tables<4, 3, 8>(s, index, x, outputs, scratch);
        break;
      case 8:
        add_tables<8, 2, 8>(s, index, x, outputs, scratch);
        break;
      default:
        add_tables<16, 2, 2>(s, index, x, outputs, scratch);
    }
    transpose_sums(total, outputs, rows, sums + (from - first), stride);
  }
}

}  // namespace
}  // namespace lutra
