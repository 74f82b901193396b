// Packed tables, and which codebooks are added in bytes. Private to avx512.cc.
//
// A group is four codebooks that share a register, in each of four outputs of a block. Its bytes
// are values less the least of their codebook and output. Where the ranges of two groups add up to
// 255 or less, byte by byte and output by output, their bytes may be added before they are widened.
// Trained tables have many small ranges, so that nearly all groups pair.
//
// Packed: blocks of 4 outputs, each a TableBlock, the order of its groups in 16-bit numbers, and
// its tables: [group, in that order][slice of 16 entries][output][64 bytes: 4 codebooks x 16].
#pragma once

#include "avx512_encode.h"
#include "table_range.h"

namespace lutra {
namespace {

constexpr int32_t kStreams = 4;  // blocks of outputs that are read together have as many pairs

struct TableBlock {
  int32_t pairs;           // the first 2 pairs groups are added two by two
  int32_t base[kOutputs];  // the sums of the minima that were subtracted
  int32_t unused[11];      // to 64 bytes
};
static_assert(sizeof(TableBlock) == 64);

int32_t table_slices(const PqShape& s) { return ceil_div(s.centroids, 16); }
int32_t group_count(const PqShape& s) { return ceil_div(s.codebooks, kBooks); }
int32_t order_bytes(const PqShape& s) { return ceil_div(2 * group_count(s), 64) * 64; }
int32_t group_bytes(int32_t slices) { return slices * kOutputs * 64; }

size_t block_bytes(const PqShape& s) {
  return sizeof(TableBlock) + order_bytes(s) +
         static_cast<size_t>(group_count(s)) * group_bytes(table_slices(s));
}

size_t table_bytes(const PqShape& s) { return ceil_div(s.outputs, kOutputs) * block_bytes(s); }

// Byte 4 o + j: codebook j and output o.
using GroupRange = __m128i;

uint8_t largest(GroupRange r) {
  alignas(16) uint8_t bytes[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(bytes), r);
  uint8_t most = 0;
  for (const uint8_t b : bytes) most = b > most ? b : most;
  return most;
}

bool fit(GroupRange a, GroupRange b) {
  const __m128i room = _mm_xor_si128(a, _mm_set1_epi8(-1));  // 255 - a
  return _mm_test_all_zeros(_mm_subs_epu8(b, room), _mm_set1_epi8(-1));
}

// Orders the groups of a block: pairs first. The largest one that is left is paired with the
// smallest, if that fits, else with nothing. Gives the number of pairs.
int32_t order_groups(const GroupRange* ranges, int32_t count, uint16_t* sorted, uint16_t* order) {
  int32_t start[257] = {};
  for (int32_t g = 0; g < count; ++g) ++start[256 - largest(ranges[g])];
  for (int32_t i = 0; i < 256; ++i) start[i + 1] += start[i];
  for (int32_t g = 0; g < count; ++g) {
    sorted[start[255 - largest(ranges[g])]++] = static_cast<uint16_t>(g);
  }
  int32_t pairs = 0, alone = count, last = count - 1;
  for (int32_t first = 0; first <= last; ++first) {
    if (first < last && fit(ranges[sorted[first]], ranges[sorted[last]])) {
      order[2 * pairs] = sorted[first];
      order[2 * pairs++ + 1] = sorted[last--];
    } else {
      order[--alone] = sorted[first];
    }
  }
  return pairs;
}

void pack_group(const PqShape& s, const int8_t* tables, int32_t group, int32_t block, uint8_t* to) {
  for (int32_t slice = 0; slice < table_slices(s); ++slice) {
    for (int32_t o = 0; o < kOutputs; ++o) {
      for (int32_t j = 0; j < kBooks; ++j) {
        const int32_t b = book_of(s, group, j), m = block + o;
        int32_t least, range;
        find_range(s, tables, b, m, &least, &range);
        for (int32_t i = 0; i < 16; ++i, ++to) {
          const int32_t k = 16 * slice + i;
          const bool there = m < s.outputs && b < s.codebooks && k < s.centroids;
          const size_t row = static_cast<size_t>(b) * s.centroids + k;
          *to = there ? static_cast<uint8_t>(tables[row * s.outputs + m] - least) : 0;
        }
      }
    }
  }
}

void find_group_ranges(const PqShape& s, const int8_t* tables, int32_t block, TableBlock* to,
                       GroupRange* ranges) {
  for (int32_t o = 0; o < kOutputs; ++o) to->base[o] = 0;
  for (int32_t g = 0; g < group_count(s); ++g) {
    alignas(16) uint8_t bytes[16];
    for (int32_t i = 0; i < 16; ++i) {
      int32_t least, range;
      find_range(s, tables, book_of(s, g, i % kBooks), block + i / kBooks, &least, &range);
      to->base[i / kBooks] += least;
      bytes[i] = static_cast<uint8_t>(range);
    }
    ranges[g] = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes));
  }
}

void pack_tables(const PqShape& s, const int8_t* tables, uint8_t* packed) {
  const int32_t groups = group_count(s);
  // One piece, so that nothing is lost where there is no memory; aligned for a register by new.
  uint8_t* const memory = new uint8_t[(sizeof(GroupRange) + sizeof(uint16_t)) * groups];
  GroupRange* const ranges = reinterpret_cast<GroupRange*>(memory);
  uint16_t* const sorted = reinterpret_cast<uint16_t*>(ranges + groups);
  for (int32_t first = 0; first < s.outputs; first += kStreams * kOutputs) {
    const int32_t end =
        first + kStreams * kOutputs < s.outputs ? first + kStreams * kOutputs : s.outputs;
    int32_t pairs = groups / 2;
    uint8_t* at = packed;
    for (int32_t block = first; block < end; block += kOutputs, at += block_bytes(s)) {
      TableBlock* const to = reinterpret_cast<TableBlock*>(at);
      find_group_ranges(s, tables, block, to, ranges);
      const int32_t n =
          order_groups(ranges, groups, sorted, reinterpret_cast<uint16_t*>(at + sizeof(*to)));
      pairs = n < pairs ? n : pairs;
    }
    for (int32_t block = first; block < end; block += kOutputs, packed += block_bytes(s)) {
      reinterpret_cast<TableBlock*>(packed)->pairs = pairs;
      const uint16_t* const order = reinterpret_cast<uint16_t*>(packed + sizeof(TableBlock));
      uint8_t* to = packed + sizeof(TableBlock) + order_bytes(s);
      for (int32_t g = 0; g < groups; ++g, to += group_bytes(table_slices(s))) {
        pack_group(s, tables, order[g], block, to);
      }
    }
  }
  delete[] memory;
}

}  // namespace
}  // namespace lutra
