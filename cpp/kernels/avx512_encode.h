// Both encoders. Private to avx512.cc.
//
// Codes of a tile: [group of 4 books][block of 16 rows][64 bytes], as many blocks as the tile has.
// Dword i belongs to row i of the block, byte j to book 4 c + j, and holds
// (code & 15) | j << 4 | (code >> 4) << 6: as it is, the index of vpermb and vpermi2b into a
// register of 4 books x 16 entries.
#pragma once

#include "avx512_gather.h"

namespace lutra {
namespace {

constexpr int32_t kBookBits = 0x30201000;  // byte j: j << 4

uint8_t* codes_at(uint8_t* codes, int32_t book, int32_t blocks) {
  return codes + static_cast<size_t>(book / kBooks) * blocks * 64;
}

// --- nearest centroid -----------------------------------------------------------------------

// How sub-vectors are cut and scores are kept.
//
// With x << up and (c - centre) << down, both within 8 bits, the dot product is 2^inner times
// x . (c - centre), which differs from x . c by the same amount for every centroid. The low `inner`
// bits of the accumulator start as a tag, so that one max finds the best score and, on ties, the
// first centroid. Where there are not enough such bits for all centroids, `outer` rounds take the
// centroids k = j (mod outer), and a tag of `outer_bits` more is shifted in once per round.
struct Cut {
  int32_t size, groups;  // entries per quad, quads per sub-vector
  int32_t inner, outer_bits, up, down, centre;
};

Cut cut_of(const PqShape& s) {
  Cut c;
  c.groups = ceil_div(s.dim, 4);
  c.size = s.dim == 3 * c.groups ? 3 : 4;  // 3, 6, 9: quads of one kernel row of a 3x3 kernel
  const int32_t spare = 8 - s.bits, levels = log2_of(s.centroids);
  c.inner = 2 * spare < levels ? 2 * spare : levels;
  c.outer_bits = levels - c.inner;
  c.up = (c.inner + 1) / 2;
  c.down = c.inner / 2;
  c.centre = 1 << (s.bits - 1);
  return c;
}

// Packed book: for each centroid, in the order of the search, `groups` dwords of centred values and
// the initial accumulator.
size_t nearest_words(const PqShape& s) {
  return static_cast<size_t>(s.centroids) * (ceil_div(s.dim, 4) + 1);
}

void pack_centroid(const PqShape& s, const Cut& cut, int32_t book, const uint8_t* c,
                   int32_t* words) {
  int32_t norm = 0;
  for (int32_t g = 0; g < cut.groups; ++g) {
    uint32_t word = 0;
    for (int32_t t = 0; t < cut.size; ++t) {
      const int32_t v = g * cut.size + t;
      if (v >= s.dim) break;
      norm += int32_t{c[v]} * c[v];
      if (book * s.dim + v >= s.depth) continue;  // x counts as zero there
      const int32_t value = (c[v] - cut.centre) * (1 << cut.down);
      word |= static_cast<uint32_t>(value & 0xff) << 8 * t;
    }
    words[g] = static_cast<int32_t>(word);
  }
  words[cut.groups] = -(norm >> 1) * (1 << cut.inner);
}

void pack_nearest(const PqShape& s, const uint8_t* centroids, uint8_t* packed) {
  const Cut cut = cut_of(s);
  int32_t* words = reinterpret_cast<int32_t*>(packed);
  const int32_t rounds = 1 << cut.outer_bits, turns = 1 << cut.inner;
  for (int32_t b = 0; b < s.books; ++b) {
    for (int32_t j = 0; j < rounds; ++j) {
      for (int32_t t = 0; t < turns; ++t, words += cut.groups + 1) {
        const size_t k = static_cast<size_t>(b) * s.centroids + t * rounds + j;
        pack_centroid(s, cut, b, centroids + k * s.dim, words);
        words[cut.groups] += turns - 1 - t;
      }
    }
  }
}

// Keys of one codebook: (score << levels) | (K - 1 - k) of the best k. x: [quad][block]
//
// Per centroid and block: kGroups vpdpbusd, which two ports take and which are the limit, and one
// vpmaxsd. The words of a centroid are broadcast once for all blocks.
template <int kGroups, int kBlocks>
void search(const __m512i* x, const int32_t* words, int32_t inner, int32_t outer_bits,
            __m512i* key) {
  const __m128i shift = _mm_cvtsi32_si128(outer_bits);
#pragma GCC unroll 4
  for (int32_t b = 0; b < kBlocks; ++b) key[b] = _mm512_set1_epi32(INT32_MIN);
  for (int32_t j = (1 << outer_bits) - 1; j >= 0; --j) {
    __m512i best[kBlocks];
#pragma GCC unroll 4
    for (int32_t b = 0; b < kBlocks; ++b) best[b] = _mm512_set1_epi32(INT32_MIN);
#pragma GCC unroll 4
    for (int32_t t = 1 << inner; t > 0; --t, words += kGroups + 1) {
      __m512i score[kBlocks];
#pragma GCC unroll 4
      for (int32_t b = 0; b < kBlocks; ++b) score[b] = _mm512_set1_epi32(words[kGroups]);
#pragma GCC unroll 4
      for (int32_t g = 0; g < kGroups; ++g) {
        const __m512i c = _mm512_set1_epi32(words[g]);
#pragma GCC unroll 4
        for (int32_t b = 0; b < kBlocks; ++b) {
          score[b] = _mm512_dpbusd_epi32(score[b], x[g * kBlocks + b], c);
        }
      }
#pragma GCC unroll 4
      for (int32_t b = 0; b < kBlocks; ++b) best[b] = _mm512_max_epi32(best[b], score[b]);
    }
    const __m512i tag = _mm512_set1_epi32(j);
#pragma GCC unroll 4
    for (int32_t b = 0; b < kBlocks; ++b) {
      const __m512i tagged = _mm512_or_si512(_mm512_sll_epi32(best[b], shift), tag);
      key[b] = _mm512_max_epi32(key[b], tagged);
    }
  }
}

// The same for long sub-vectors, whose quads stay in memory; two centroids share their loads.
template <int kBlocks>
void search_long(const __m512i* x, const int32_t* words, const Cut& cut, __m512i* key) {
  const __m128i shift = _mm_cvtsi32_si128(cut.outer_bits);
  const int32_t stride = cut.groups + 1;
#pragma GCC unroll 4
  for (int32_t b = 0; b < kBlocks; ++b) key[b] = _mm512_set1_epi32(INT32_MIN);
  for (int32_t j = (1 << cut.outer_bits) - 1; j >= 0; --j) {
    __m512i best[kBlocks];
#pragma GCC unroll 4
    for (int32_t b = 0; b < kBlocks; ++b) best[b] = _mm512_set1_epi32(INT32_MIN);
    for (int32_t t = 1 << cut.inner; t > 0; t -= 2, words += 2 * stride) {
      __m512i s0[kBlocks], s1[kBlocks];
#pragma GCC unroll 4
      for (int32_t b = 0; b < kBlocks; ++b) {
        s0[b] = _mm512_set1_epi32(words[stride - 1]);
        s1[b] = _mm512_set1_epi32(words[2 * stride - 1]);
      }
      for (int32_t g = 0; g < cut.groups; ++g) {
        const __m512i c0 = _mm512_set1_epi32(words[g]), c1 = _mm512_set1_epi32(words[stride + g]);
#pragma GCC unroll 4
        for (int32_t b = 0; b < kBlocks; ++b) {
          s0[b] = _mm512_dpbusd_epi32(s0[b], x[g * kBlocks + b], c0);
          s1[b] = _mm512_dpbusd_epi32(s1[b], x[g * kBlocks + b], c1);
        }
      }
#pragma GCC unroll 4
      for (int32_t b = 0; b < kBlocks; ++b) {
        best[b] = _mm512_max_epi32(best[b], _mm512_max_epi32(s0[b], s1[b]));
      }
    }
    const __m512i tag = _mm512_set1_epi32(j);
#pragma GCC unroll 4
    for (int32_t b = 0; b < kBlocks; ++b) {
      const __m512i tagged = _mm512_or_si512(_mm512_sll_epi32(best[b], shift), tag);
      key[b] = _mm512_max_epi32(key[b], tagged);
    }
  }
}

// Keys -> indices of the lookup, into byte b % 4 of the dwords.
template <int kBlocks>
void store_codes(const __m512i* key, int32_t centroids, int32_t book, uint8_t* to) {
  const __m512i code_bits = _mm512_set1_epi32(centroids - 1);
  const __m128i slot = _mm_cvtsi32_si128(8 * (book % kBooks));
#pragma GCC unroll 4
  for (int32_t i = 0; i < kBlocks; ++i) {
    __m512i code = _mm512_andnot_si512(key[i], code_bits);  // K - 1 - (K - 1 - k)
    if (centroids > 16) {
      const __m512i low = _mm512_and_si512(code, _mm512_set1_epi32(15));
      code = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_sub_epi32(code, low), 2));
    }
    const __m512i others =
        book % kBooks ? _mm512_loadu_si512(to + 64 * i) : _mm512_set1_epi32(kBookBits);
    _mm512_storeu_si512(to + 64 * i, _mm512_or_si512(others, _mm512_sll_epi32(code, slot)));
  }
}

void gather_quads(const uint8_t* planes, const Quad* quads, int32_t groups, const Rows& rows,
                  __m512i* x) {
  for (int32_t g = 0; g < groups; ++g) {
    for (int32_t i = 0; i < rows.blocks; ++i) *x++ = gather_quad(planes, quads[g], rows.block[i]);
  }
}

bool all_single(const Quad* quads, int32_t groups) {
  int32_t sources = 0;
  for (int32_t g = 0; g < groups; ++g) sources += quads[g].sources;
  return sources == groups;
}

// Books first .. last - 1; kGroups == 0: any number of quads.
template <int kGroups, int kBlocks>
void nearest_books(const PqShape& s, const uint8_t* packed, const Patch& p, int32_t first,
                   int32_t last, uint8_t* codes) {
  const Cut cut = cut_of(s);
  Rows rows;
  find_rows(p, rows);
  QuadFinder finder(p, s.depth, s.taps, s.dim, cut.size, 63 - rows.reach);
  const __m128i up = _mm_cvtsi32_si128(cut.up);
  const size_t book_words = nearest_words(s);
  const int32_t* words = reinterpret_cast<const int32_t*>(packed) + first * book_words;
  for (int32_t b = first; b < last; ++b, words += book_words) {
    const uint8_t* planes;
    const Quad* quads;
    finder.next(b, planes, quads);
    __m512i key[kBlocks];
    uint8_t* const to = codes_at(codes, b, kBlocks);
    if constexpr (kGroups == 0) {
      __m512i x[16 * kBlocks];
      gather_quads(planes, quads, cut.groups, rows, x);
      for (int32_t i = 0; i < cut.groups * kBlocks; ++i) x[i] = _mm512_sll_epi32(x[i], up);
      search_long<kBlocks>(x, words, cut, key);
    } else {
      __m512i x[kGroups * kBlocks];
      if (rows.single && all_single(quads, kGroups)) {
#pragma GCC unroll 4
        for (int32_t g = 0; g < kGroups; ++g) {
          const __m512i offset = _mm512_set1_epi32(quads[g].offset);
          const uint8_t* const at = planes + quads[g].base[0];
#pragma GCC unroll 4
          for (int32_t i = 0; i < kBlocks; ++i) {
            const __m512i index = _mm512_add_epi8(rows.block[i].offset, offset);
            x[g * kBlocks + i] =
                _mm512_permutexvar_epi8(index, _mm512_loadu_si512(at + rows.block[i].base[0]));
          }
        }
      } else {
        __m512i gathered[kGroups * kBlocks];
        gather_quads(planes, quads, kGroups, rows, gathered);
#pragma GCC unroll 16
        for (int32_t i = 0; i < kGroups * kBlocks; ++i) x[i] = _mm512_load_si512(gathered + i);
      }
#pragma GCC unroll 16
      for (int32_t i = 0; i < kGroups * kBlocks; ++i) x[i] = _mm512_sll_epi32(x[i], up);
      if (cut.inner == 4 && cut.outer_bits == 0) {
        search<kGroups, kBlocks>(x, words, 4, 0, key);
      } else {
        search<kGroups, kBlocks>(x, words, cut.inner, cut.outer_bits, key);
      }
    }
    store_codes<kBlocks>(key, s.centroids, b, to);
  }
}

template <int kGroups>
void nearest_blocks(const PqShape& s, const uint8_t* packed, const Patch& p, int32_t first,
                    int32_t last, uint8_t* codes) {
  switch (row_blocks(p.rows)) {
    case 1:
      return nearest_books<kGroups, 1>(s, packed, p, first, last, codes);
    case 2:
      return nearest_books<kGroups, 2>(s, packed, p, first, last, codes);
    case 3:
      return nearest_books<kGroups, 3>(s, packed, p, first, last, codes);
    default:
      return nearest_books<kGroups, 4>(s, packed, p, first, last, codes);
  }
}

void encode_nearest(const PqShape& s, const uint8_t* packed, const Patch& p, int32_t first,
                    int32_t last, uint8_t* codes) {
  switch (ceil_div(s.dim, 4)) {
    case 1:
      return nearest_blocks<1>(s, packed, p, first, last, codes);
    case 2:
      return nearest_blocks<2>(s, packed, p, first, last, codes);
    case 3:
      return nearest_blocks<3>(s, packed, p, first, last, codes);
    case 4:
      return nearest_blocks<4>(s, packed, p, first, last, codes);
    default:
      return nearest_blocks<0>(s, packed, p, first, last, codes);
  }
}

// --- tree -----------------------------------------------------------------------------------
//
// The heap is numbered from 1, so that a step is node = 2 node + bit, and node & (K - 1) is the
// code. Packed: thresholds of each book by node, 16 bytes for K <= 16 and 64 otherwise; then
// (plane, tap) of each book and level. Both for a multiple of 4 books, the missing ones zero.

int32_t heap_bytes(const PqShape& s) { return s.centroids <= 16 ? 16 : 64; }
int32_t padded_books(const PqShape& s) { return ceil_div(s.books, kBooks) * kBooks; }

size_t tree_bytes(const PqShape& s) {
  return static_cast<size_t>(padded_books(s)) * (heap_bytes(s) + 8 * log2_of(s.centroids));
}

void pack_tree(const PqShape& s, const int32_t* splits, const uint8_t* thresholds,
               uint8_t* packed) {
  const int32_t heap = heap_bytes(s), levels = log2_of(s.centroids);
  int32_t* split = reinterpret_cast<int32_t*>(packed + static_cast<size_t>(padded_books(s)) * heap);
  for (int32_t b = 0; b < padded_books(s); ++b, packed += heap) {
    const bool there = b < s.books;
    for (int32_t n = 0; n < heap; ++n) {
      const bool node = there && n > 0 && n < s.centroids;
      packed[n] = node ? thresholds[static_cast<size_t>(b) * (s.centroids - 1) + n - 1] : 0;
    }
    for (int32_t l = 0; l < levels; ++l, split += 2) {
      const int32_t d = there ? splits[b * levels + l] : 0;
      split[0] = d / s.taps;
      split[1] = d % s.taps;
    }
  }
}

// The rows of a whole tile, one byte each. Where they are not consecutive, the index of the permute
// also brings rows into the order in which the unpacks of `interleave` deliver them.
struct ByteRows {
  bool consecutive;
  bool pair;         // all within 128 bytes, but not 64: one permute of two registers
  int32_t segments;  // otherwise as in RowBlock
  __m512i index;
  int32_t base[64];
  __mmask64 rows[64];
};

void find_byte_rows(const Patch& p, ByteRows& rows) {
  rows.consecutive = p.consecutive;
  rows.base[0] = p.row[0];
  if (p.consecutive) return;
  const int32_t span = p.row[kRows - 1] - p.row[0];
  rows.pair = span >= 64 && span < 128;
  rows.segments = 0;
  alignas(64) uint8_t index[64];
  __mmask64 in = 0;
  int32_t base = p.row[0];
  for (int32_t r = 0; r < kRows; ++r) {
    if (!rows.pair && p.row[r] - base >= 64) {
      rows.base[rows.segments] = base;
      rows.rows[rows.segments++] = in;
      base = p.row[r];
      in = 0;
    }
    const int32_t at = (r & 12) * 4 + (r >> 4) * 4 + (r & 3);  // where the unpacks want row r
    index[at] = static_cast<uint8_t>(p.row[r] - base);
    in |= 1ull << at;
  }
  rows.base[rows.segments] = base;
  rows.rows[rows.segments++] = in;
  rows.index = _mm512_load_si512(index);
}

enum class Reach { kPlain, kSingle, kPair, kSegments };

template <Reach kReach>
__m512i load_rows(const uint8_t* at, const ByteRows& rows) {
  if constexpr (kReach == Reach::kPlain) {
    return _mm512_loadu_si512(at + rows.base[0]);
  } else if constexpr (kReach == Reach::kSingle) {
    return _mm512_permutexvar_epi8(rows.index, _mm512_loadu_si512(at + rows.base[0]));
  } else if constexpr (kReach == Reach::kPair) {
    return _mm512_permutex2var_epi8(_mm512_loadu_si512(at + rows.base[0]), rows.index,
                                    _mm512_loadu_si512(at + rows.base[0] + 64));
  } else {
    __m512i x = _mm512_setzero_si512();
    for (int32_t i = 0; i < rows.segments; ++i) {
      const __m512i from = _mm512_loadu_si512(at + rows.base[i]);
      x = _mm512_mask_permutexvar_epi8(x, rows.rows[i], rows.index, from);
    }
    return x;
  }
}

// Four registers of one byte per row -> blocks of 16 rows x 4 bytes; rows in the order above.
void interleave(const __m512i* p, __m512i* quads) {
  const __m512i lo01 = _mm512_unpacklo_epi8(p[0], p[1]), hi01 = _mm512_unpackhi_epi8(p[0], p[1]);
  const __m512i lo23 = _mm512_unpacklo_epi8(p[2], p[3]), hi23 = _mm512_unpackhi_epi8(p[2], p[3]);
  quads[0] = _mm512_unpacklo_epi16(lo01, lo23);
  quads[1] = _mm512_unpackhi_epi16(lo01, lo23);
  quads[2] = _mm512_unpacklo_epi16(hi01, hi23);
  quads[3] = _mm512_unpackhi_epi16(hi01, hi23);
}

// Nodes -> what the lookup wants of book j of its group.
template <int kLevels>
__m512i node_to_index(__m512i node, int32_t j) {
  const __m512i book = _mm512_set1_epi8(static_cast<char>(j << 4));
  const __m512i low = _mm512_set1_epi8(static_cast<char>(((1 << kLevels) - 1) & 15));
  __m512i code = _mm512_or_si512(_mm512_and_si512(node, low), book);
  if constexpr (kLevels > 4) {
    const __m512i high = _mm512_set1_epi8(static_cast<char>((((1 << kLevels) - 1) >> 4) << 6));
    code = _mm512_or_si512(code, _mm512_and_si512(_mm512_slli_epi16(node, 2), high));
  }
  return code;
}

// 64 rows of a book at a time. Per level a load, a shuffle (the thresholds of the nodes), a
// compare, an add and a masked add.
template <int kLevels, Reach kReach>
void tree_wide(const PqShape& s, const uint8_t* packed, const Patch& p, const ByteRows& rows,
               int32_t first, int32_t last, uint8_t* codes) {
  constexpr int32_t kHeap = kLevels <= 4 ? 16 : 64;
  const int32_t* split =
      reinterpret_cast<const int32_t*>(packed + static_cast<size_t>(padded_books(s)) * kHeap) +
      static_cast<size_t>(first) * kLevels * 2;
  const uint8_t* heap = packed + static_cast<size_t>(first) * kHeap;
  const int32_t blocks = row_blocks(p.rows);
  const __m512i one = _mm512_set1_epi8(1);
  for (int32_t b = first; b < last; b += kBooks) {
    __m512i index[kBooks];
    for (int32_t j = 0; j < kBooks; ++j, heap += kHeap) {
      __m512i table;
      if constexpr (kLevels <= 4) {
        table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(heap)));
      } else {
        table = _mm512_loadu_si512(heap);
      }
      __m512i node = one;
      for (int32_t l = 0; l < kLevels; ++l, split += 2) {
        const __m512i x = load_rows<kReach>(p.planes + split[0] * p.plane + p.tap[split[1]], rows);
        const __m512i threshold =
            kLevels <= 4 ? _mm512_shuffle_epi8(table, node) : _mm512_permutexvar_epi8(node, table);
        const __mmask64 right = _mm512_cmpge_epu8_mask(x, threshold);
        node = _mm512_add_epi8(node, node);
        node = _mm512_mask_add_epi8(node, right, node, one);
      }
      index[j] = node_to_index<kLevels>(node, j);
      if constexpr (kReach == Reach::kPlain) index[j] = transpose_dwords(index[j]);
    }
    __m512i quads[4];
    interleave(index, quads);
    uint8_t* const to = codes_at(codes, b, blocks);
    for (int32_t i = 0; i < blocks; ++i) _mm512_storeu_si512(to + 64 * i, quads[i]);
  }
}

// 16 rows of four books at a time, a lane of 128 bits for each book: for tiles of few rows. K
// <= 16.
template <int kLevels>
void tree_block(const PqShape& s, const uint8_t* packed, const Patch& p, const RowBlock& block,
                bool consecutive, int32_t first, int32_t last, uint8_t* codes, int32_t blocks) {
  const int32_t* split =
      reinterpret_cast<const int32_t*>(packed + static_cast<size_t>(padded_books(s)) * 16) +
      static_cast<size_t>(first) * kLevels * 2;
  const __m512i one = _mm512_set1_epi8(1);
  const __m512i book = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_setr_epi64x(0, 0, 0x1010101010101010, 0x1010101010101010)),
      _mm256_setr_epi64x(0x2020202020202020, 0x2020202020202020, 0x3030303030303030,
                         0x3030303030303030),
      1);
  const __m512i low = _mm512_set1_epi8((1 << kLevels) - 1);
  // Byte 16 j + i -> row i, and at the end byte 4 i + j -> book j of row i.
  alignas(64) uint8_t rows_index[64], natural[64];
  alignas(64) uint8_t offset[64];
  _mm512_store_si512(offset, block.offset);
  for (int32_t i = 0; i < 64; ++i) {
    rows_index[i] = offset[4 * (i % 16)];
    natural[i] = static_cast<uint8_t>(16 * (i % 4) + i / 4);
  }
  __mmask64 lane_rows[16];
  for (int32_t i = 0; i < block.segments; ++i) {
    uint64_t in = 0;
    for (int32_t r = 0; r < 16; ++r) in |= (block.rows[i] >> 4 * r & 1) << r;
    lane_rows[i] = in * 0x0001000100010001ull;
  }
  const __m512i index = _mm512_load_si512(rows_index), order = _mm512_load_si512(natural);
  for (int32_t b = first; b < last; b += kBooks, split += 2 * kLevels * kBooks) {
    const __m512i heaps = _mm512_loadu_si512(packed + static_cast<size_t>(b) * 16);
    __m512i node = one;
    for (int32_t l = 0; l < kLevels; ++l) {
      __m512i x = _mm512_setzero_si512();
      for (int32_t j = 0; j < kBooks; ++j) {
        const int32_t* const at = split + 2 * (j * kLevels + l);
        const uint8_t* const from = p.planes + at[0] * p.plane + p.tap[at[1]];
        if (consecutive) {
          const __m128i line =
              _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + block.base[0]));
          x = _mm512_mask_broadcast_i32x4(x, static_cast<__mmask16>(15 << 4 * j), line);
          continue;
        }
        for (int32_t i = 0; i < block.segments; ++i) {
          const __mmask64 in = lane_rows[i] & (0xffffull << 16 * j);
          x = _mm512_mask_permutexvar_epi8(x, in, index, _mm512_loadu_si512(from + block.base[i]));
        }
      }
      const __mmask64 right = _mm512_cmpge_epu8_mask(x, _mm512_shuffle_epi8(heaps, node));
      node = _mm512_add_epi8(node, node);
      node = _mm512_mask_add_epi8(node, right, node, one);
    }
    const __m512i code = _mm512_or_si512(_mm512_and_si512(node, low), book);
    _mm512_storeu_si512(codes_at(codes, b, blocks), _mm512_permutexvar_epi8(order, code));
  }
}

template <int kLevels>
void encode_tree(const PqShape& s, const uint8_t* packed, const Patch& p, int32_t first,
                 int32_t last, uint8_t* codes) {
  const int32_t blocks = row_blocks(p.rows), span = p.row[kRows - 1] - p.row[0];
  if constexpr (kLevels <= 4) {
    if (blocks <= 2 || (span >= 128 && !p.consecutive)) {
      Rows rows;
      find_rows(p, rows);
      for (int32_t i = 0; i < blocks; ++i) {
        tree_block<kLevels>(s, packed, p, rows.block[i], p.consecutive, first, last, codes + 64 * i,
                            blocks);
      }
      return;
    }
  }
  ByteRows rows;
  find_byte_rows(p, rows);
  if (rows.consecutive) {
    tree_wide<kLevels, Reach::kPlain>(s, packed, p, rows, first, last, codes);
  } else if (rows.pair) {
    tree_wide<kLevels, Reach::kPair>(s, packed, p, rows, first, last, codes);
  } else if (rows.segments == 1) {
    tree_wide<kLevels, Reach::kSingle>(s, packed, p, rows, first, last, codes);
  } else {
    tree_wide<kLevels, Reach::kSegments>(s, packed, p, rows, first, last, codes);
  }
}

// --- both -----------------------------------------------------------------------------------

size_t encoder_bytes(const PqShape& s) {
  if (s.encoder == Encoder::kTree) return tree_bytes(s);
  return static_cast<size_t>(s.books) * nearest_words(s) * sizeof(int32_t);
}

size_t code_bytes(const PqShape& s) {
  return static_cast<size_t>(ceil_div(s.books, kBooks)) * kBooks * kRows;
}

void encode(const PqShape& s, const uint8_t* packed, const Patch& p, int32_t first, int32_t last,
            uint8_t* codes) {
  if (s.encoder == Encoder::kNearest) return encode_nearest(s, packed, p, first, last, codes);
  switch (s.centroids) {
    case 8:
      return encode_tree<3>(s, packed, p, first, last, codes);
    case 16:
      return encode_tree<4>(s, packed, p, first, last, codes);
    case 32:
      return encode_tree<5>(s, packed, p, first, last, codes);
    default:
      return encode_tree<6>(s, packed, p, first, last, codes);
  }
}

void unpack_codes(const PqShape& s, const uint8_t* codes, int32_t rows, uint8_t* out,
                  size_t stride) {
  const int32_t blocks = row_blocks(rows);
  alignas(64) uint8_t planes[64];
  for (int32_t i = 0; i < 64; ++i) planes[i] = static_cast<uint8_t>(4 * (i % 16) + i / 16);
  const __m512i order = _mm512_load_si512(planes);
  for (int32_t b = 0; b < s.books; b += kBooks) {
    for (int32_t i = 0; i < blocks; ++i, codes += 64) {
      const __m512i x = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(codes));
      const __m512i low = _mm512_and_si512(x, _mm512_set1_epi8(15));
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(x, 2), _mm512_set1_epi8(0x30));
      _mm512_store_si512(planes, _mm512_or_si512(low, high));
      for (int32_t j = 0; j < kBooks && b + j < s.books; ++j) {
        const __m128i line = _mm_load_si128(reinterpret_cast<const __m128i*>(planes + 16 * j));
        _mm_mask_storeu_epi8(out + (b + j) * stride + 16 * i, lane_mask(rows - 16 * i), line);
      }
    }
  }
}

}  // namespace
}  // namespace lutra
