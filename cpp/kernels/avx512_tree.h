// Codes by decision trees. Private to avx512.cc.
//
// The heap is numbered from 1, so that a step is node = 2 node + bit, and node & (K - 1) is the
// code.
//
// Packed, for each group of 4 codebooks: the thresholds of each codebook by node, 16 bytes for K <=
// 16 and 64 otherwise; then the planes of the values that are compared, as dwords
// [level][codebook], then their taps. Zeros fill both to a multiple of 16, and the places of
// missing codebooks.
#pragma once

#include "avx512_gather.h"

namespace lutra {
namespace {

constexpr int32_t heap_bytes(int32_t levels) { return levels <= 4 ? 16 : 64; }
constexpr int32_t split_words(int32_t levels) { return levels <= 4 ? 16 : 32; }
constexpr int32_t tree_group_bytes(int32_t levels) {
  return kBooks * heap_bytes(levels) + 8 * split_words(levels);
}

size_t tree_bytes(const PqShape& s) {
  return static_cast<size_t>(ceil_div(s.codebooks, kBooks)) *
         tree_group_bytes(log2_of(s.centroids));
}

void pack_tree(const PqShape& s, const int32_t* splits, const uint8_t* thresholds,
               uint8_t* packed) {
  const int32_t levels = log2_of(s.centroids), heap = heap_bytes(levels);
  for (size_t i = 0; i < tree_bytes(s); ++i) packed[i] = 0;
  for (int32_t b = 0; b < s.codebooks; ++b) {
    uint8_t* const group = packed + static_cast<size_t>(b / kBooks) * tree_group_bytes(levels);
    const int32_t j = b % kBooks;
    for (int32_t n = 1; n < s.centroids; ++n) {  // the usual node -> the mirrored one
      const int32_t mirrored = (3 << log2_of(n)) - 1 - n;
      group[j * heap + mirrored] = *thresholds++;
    }
    int32_t* const plane = reinterpret_cast<int32_t*>(group + kBooks * heap);
    int32_t* const tap = plane + split_words(levels);
    for (int32_t l = 0; l < levels; ++l) {
      plane[l * kBooks + j] = splits[b * levels + l] / s.taps;
      tap[l * kBooks + j] = splits[b * levels + l] % s.taps;
    }
  }
}

// at[4 l + j]: where, from the planes on, the value is that level l of codebook j compares.
template <int kLevels>
void find_group_splits(const uint8_t* group, const Patch& p, int32_t taps, int64_t* at) {
  const int32_t* const plane =
      reinterpret_cast<const int32_t*>(group + kBooks * heap_bytes(kLevels));
  const int32_t* const tap = plane + split_words(kLevels);
  if (taps > 16) {
    for (int32_t i = 0; i < kLevels * kBooks; ++i) at[i] = plane[i] * p.plane + p.tap[tap[i]];
    return;
  }
  const __m512i offsets = _mm512_maskz_loadu_epi32(lane_mask(taps), p.tap);
  const __m512i step = _mm512_set1_epi64(p.plane);
#pragma GCC unroll 4
  for (int32_t i = 0; i < kLevels * kBooks; i += 8) {
    const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tap + i));
    const __m256i planes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane + i));
    const __m512i of_tap = _mm512_permutexvar_epi32(_mm512_castsi256_si512(index), offsets);
    const __m512i of_plane = _mm512_mullo_epi64(_mm512_cvtepi32_epi64(planes), step);
    _mm512_store_si512(
        at + i, _mm512_add_epi64(of_plane, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(of_tap))));
  }
}

// The same of several groups, ahead of their use: it would take longer than the walk itself.
constexpr int32_t kSplitGroups = 8;

struct Splits {
  alignas(64) int64_t at[kSplitGroups][32];
};

template <int kLevels>
void find_splits(const uint8_t* group, const Patch& p, int32_t taps, int32_t codebooks,
                 Splits& splits) {
  for (int32_t c = 0; c < kSplitGroups && c * kBooks < codebooks; ++c) {
    find_group_splits<kLevels>(group + c * tree_group_bytes(kLevels), p, taps, splits.at[c]);
  }
}

__m512i step_down(__m512i node, __m512i x, __m512i threshold) {
  const __m512i left = _mm512_min_epu8(_mm512_subs_epu8(threshold, x), _mm512_set1_epi8(1));
  return _mm512_add_epi8(_mm512_add_epi8(node, node), left);
}

// Nodes -> what the lookup wants; `codebook` has j << 4 for codebook j of its group.
template <int kLevels>
__m512i node_to_index(__m512i node, __m512i codebook) {
  const __m512i low = _mm512_set1_epi8(static_cast<char>(((1 << kLevels) - 1) & 15));
  __m512i code = _mm512_or_si512(_mm512_andnot_si512(node, low), codebook);
  if constexpr (kLevels > 4) {
    const __m512i high = _mm512_set1_epi8(static_cast<char>((((1 << kLevels) - 1) >> 4) << 6));
    code = _mm512_or_si512(code, _mm512_andnot_si512(_mm512_slli_epi16(node, 2), high));
  }
  return code;
}

// --- 64 rows of a codebook at a time
// ---------------------------------------------------------------

// Per level a load (and the permute of the rows), a shuffle of the thresholds, a compare, an add
// and a masked add. The loads, most of which cross a line of the cache, weigh as much as the rest.
template <int kLevels, Reach kReach>
void tree_wide(const PqShape& s, const uint8_t* group, const Patch& p, const ByteRows& rows,
               int32_t first, int32_t last, uint8_t* codes) {
  const int32_t blocks = row_blocks(p.rows);
  Splits splits;
  int32_t c = kSplitGroups;
  for (int32_t b = first; b < last; b += kBooks, group += tree_group_bytes(kLevels)) {
    if (c == kSplitGroups) {
      find_splits<kLevels>(group, p, s.taps, last - b, splits);
      c = 0;
    }
    const int64_t* const at = splits.at[c++];
    __m512i index[kBooks], quads[4];
#pragma GCC unroll 4
    for (int32_t j = 0; j < kBooks; ++j) {
      const uint8_t* const heap = group + j * heap_bytes(kLevels);
      __m512i table;
      if constexpr (kLevels <= 4) {
        table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(heap)));
      } else {
        table = _mm512_loadu_si512(heap);
      }
      __m512i node = _mm512_set1_epi8(1);
#pragma GCC unroll 8
      for (int32_t l = 0; l < kLevels; ++l) {
        const __m512i x = load_rows<kReach>(p.planes + at[l * kBooks + j], rows);
        node = step_down(
            node, x,
            kLevels <= 4 ? _mm512_shuffle_epi8(table, node) : _mm512_permutexvar_epi8(node, table));
      }
      index[j] = node_to_index<kLevels>(node, _mm512_set1_epi8(static_cast<char>(j << 4)));
      if constexpr (kReach == Reach::kPlain) index[j] = transpose_dwords(index[j]);
    }
    interleave(index, quads);
    uint8_t* const to = codes_at(codes, b, blocks);
#pragma GCC unroll 4
    for (int32_t i = 0; i < 4; ++i) {
      if (i < blocks) _mm512_storeu_si512(to + 64 * i, quads[i]);
    }
  }
}

// --- 16 rows of four codebooks at a time
// -------------------------------------------------------------

struct LaneRows {  // byte i of each lane of 128 bits is row i
  bool consecutive;
  int32_t segments;
  __m512i index;
  int32_t base[16];
  __mmask64 rows[16];
};

void find_lane_rows(const RowBlock& block, int32_t valid, LaneRows& rows) {
  const __m128i iota = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m128i offset = _mm512_cvtepi32_epi8(block.offset);
  rows.segments = block.segments;
  rows.consecutive =
      block.segments == 1 && !_mm_mask_cmpneq_epi8_mask(lane_mask(valid), offset, iota);
  rows.index = _mm512_broadcast_i32x4(offset);
  for (int32_t i = 0; i < block.segments; ++i) {
    rows.base[i] = block.base[i];
    const __m128i in = _mm512_cvtepi32_epi8(_mm512_movm_epi8(block.rows[i]));
    rows.rows[i] = _mm512_movepi8_mask(_mm512_broadcast_i32x4(in));
  }
}

// Four values of each row, one in each lane.
__m512i load_lanes(const uint8_t* planes, const int64_t* at, const LaneRows& rows) {
  constexpr __mmask64 kLane = 0xffff;
  if (rows.consecutive) {
    __m128i x[4];
#pragma GCC unroll 4
    for (int32_t j = 0; j < 4; ++j) {
      const uint8_t* const from = planes + at[j] + rows.base[0];
      x[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    }
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(x[0]), x[1], 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(x[2]), x[3], 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  __m512i x[4];
#pragma GCC unroll 4
  for (int32_t j = 0; j < 4; ++j) {
    x[j] = _mm512_maskz_permutexvar_epi8(rows.rows[0] & kLane << 16 * j, rows.index,
                                         _mm512_loadu_si512(planes + at[j] + rows.base[0]));
  }
  for (int32_t i = 1; i < rows.segments; ++i) {
#pragma GCC unroll 4
    for (int32_t j = 0; j < 4; ++j) {
      x[j] = _mm512_mask_permutexvar_epi8(x[j], rows.rows[i] & kLane << 16 * j, rows.index,
                                          _mm512_loadu_si512(planes + at[j] + rows.base[i]));
    }
  }
  return _mm512_or_si512(_mm512_or_si512(x[0], x[1]), _mm512_or_si512(x[2], x[3]));
}

// A lane for each codebook, so that one register walks four trees: for tiles of few rows, and for
// rows that lie far apart. K <= 16.
template <int kLevels>
void tree_lanes(const PqShape& s, const uint8_t* group, const Patch& p, const Rows& rows,
                int32_t first, int32_t last, uint8_t* codes) {
  const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512i codebook = _mm512_mullo_epi32(lane, _mm512_set1_epi32(0x10101010));
  // byte 4 i + j <- byte 16 j + i
  const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i order = _mm512_add_epi32(_mm512_mullo_epi32(iota, _mm512_set1_epi32(0x01010101)),
                                         _mm512_set1_epi32(kBookBits));
  LaneRows lanes[4];
  for (int32_t i = 0; i < rows.blocks; ++i) {
    find_lane_rows(rows.block[i], p.rows - 16 * i, lanes[i]);
  }
  Splits splits;
  int32_t c = kSplitGroups;
  for (int32_t b = first; b < last; b += kBooks, group += tree_group_bytes(kLevels)) {
    if (c == kSplitGroups) {
      find_splits<kLevels>(group, p, s.taps, last - b, splits);
      c = 0;
    }
    const int64_t* const at = splits.at[c++];
    const __m512i heaps = _mm512_loadu_si512(group);
    uint8_t* const to = codes_at(codes, b, rows.blocks);
    for (int32_t i = 0; i < rows.blocks; ++i) {
      __m512i node = _mm512_set1_epi8(1);
#pragma GCC unroll 4
      for (int32_t l = 0; l < kLevels; ++l) {
        const __m512i x = load_lanes(p.planes, at + l * kBooks, lanes[i]);
        node = step_down(node, x, _mm512_shuffle_epi8(heaps, node));
      }
      const __m512i index = node_to_index<kLevels>(node, codebook);
      _mm512_storeu_si512(to + 64 * i, _mm512_permutexvar_epi8(order, index));
    }
  }
}

template <int kLevels>
void tree_levels(const PqShape& s, const uint8_t* packed, const Patch& p, int32_t first,
                 int32_t last, uint8_t* codes) {
  const uint8_t* const group =
      packed + static_cast<size_t>(first / kBooks) * tree_group_bytes(kLevels);
  ByteRows rows;
  find_byte_rows(p, rows);
  if constexpr (kLevels <= 4) {
    if (p.rows <= 2 * kRowBlock || rows.reach == Reach::kSegments) {
      Rows blocks;
      find_rows(p, blocks);
      return tree_lanes<kLevels>(s, group, p, blocks, first, last, codes);
    }
  }
  switch (rows.reach) {
    case Reach::kPlain:
      return tree_wide<kLevels, Reach::kPlain>(s, group, p, rows, first, last, codes);
    case Reach::kSingle:
      return tree_wide<kLevels, Reach::kSingle>(s, group, p, rows, first, last, codes);
    case Reach::kPair:
      return tree_wide<kLevels, Reach::kPair>(s, group, p, rows, first, last, codes);
    case Reach::kWidePair:
      return tree_wide<kLevels, Reach::kWidePair>(s, group, p, rows, first, last, codes);
    case Reach::kSegments:
      find_segments(p, rows);
      return tree_wide<kLevels, Reach::kSegments>(s, group, p, rows, first, last, codes);
  }
}

void encode_tree(const PqShape& s, const uint8_t* packed, const Patch& p, int32_t first,
                 int32_t last, uint8_t* codes) {
  switch (s.centroids) {
    case 8:
      return tree_levels<3>(s, packed, p, first, last, codes);
    case 16:
      return tree_levels<4>(s, packed, p, first, last, codes);
    case 32:
      return tree_levels<5>(s, packed, p, first, last, codes);
    default:
      return tree_levels<6>(s, packed, p, first, last, codes);
  }
}

}  // namespace
}  // namespace lutra
