// The nearest centroid, and what both encoders share. Private to avx512.cc.
#pragma once

#include "avx512_tree.h"

namespace lutra {
namespace {

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

// Packed codebook: for each centroid, in the order of the search, `groups` dwords of centred values
// and the initial accumulator. For the other distances these come after `groups` dwords that mask
// the entries which exist, and values are as they are.
size_t nearest_words(const PqShape& s) {
  const int32_t groups = ceil_div(s.dim, 4);
  const size_t words = static_cast<size_t>(s.centroids) * (groups + 1);
  return s.distance == Distance::kL2 ? words : words + groups;
}

void pack_centroid(const PqShape& s, const Cut& cut, int32_t codebook, const uint8_t* c,
                   int32_t* words) {
  int32_t norm = 0;
  for (int32_t g = 0; g < cut.groups; ++g) {
    uint32_t word = 0;
    for (int32_t t = 0; t < cut.size; ++t) {
      const int32_t v = g * cut.size + t;
      if (v >= s.dim) break;
      norm += int32_t{c[v]} * c[v];
      if (codebook * s.dim + v >= s.depth) continue;  // x counts as zero there
      const int32_t value = (c[v] - cut.centre) * (1 << cut.down);
      word |= static_cast<uint32_t>(value & 0xff) << 8 * t;
    }
    words[g] = static_cast<int32_t>(word);
  }
  words[cut.groups] = -(norm >> 1) * (1 << cut.inner);
}

void pack_apart(const PqShape& s, const uint8_t* centroids, uint8_t* packed) {
  const Cut cut = cut_of(s);
  uint32_t* words = reinterpret_cast<uint32_t*>(packed);
  for (int32_t b = 0; b < s.codebooks; ++b) {
    for (int32_t g = 0; g < cut.groups; ++g) {
      uint32_t mask = 0;
      for (int32_t t = 0; t < cut.size; ++t) {
        const int32_t v = g * cut.size + t;
        if (v < s.dim && b * s.dim + v < s.depth) mask |= 0xffu << 8 * t;
      }
      *words++ = mask;
    }
    for (int32_t k = 0; k < s.centroids; ++k, centroids += s.dim) {
      for (int32_t g = 0; g < cut.groups; ++g) {
        uint32_t word = 0;
        for (int32_t t = 0; t < cut.size && g * cut.size + t < s.dim; ++t) {
          word |= static_cast<uint32_t>(centroids[g * cut.size + t]) << 8 * t;
        }
        *words++ = word;
      }
      *words++ = static_cast<uint32_t>(s.centroids - 1 - k);
    }
  }
}

void pack_nearest(const PqShape& s, const uint8_t* centroids, uint8_t* packed) {
  if (s.distance != Distance::kL2) return pack_apart(s, centroids, packed);
  const Cut cut = cut_of(s);
  int32_t* words = reinterpret_cast<int32_t*>(packed);
  const int32_t rounds = 1 << cut.outer_bits, turns = 1 << cut.inner;
  for (int32_t b = 0; b < s.codebooks; ++b) {
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

// Sums of absolute differences, or the largest of them: bytes of at most 127 differ by what fits a
// signed byte. Keys are K - 1 - k - K distance. Per quad and block three instructions instead of
// the one of a product, and for the largest seven more per centroid, which take it out of the four
// bytes of a dword.
template <Distance kDistance, int kBlocks>
void search_apart(const __m512i* x, const int32_t* words, int32_t groups, int32_t centroids,
                  __m512i* key) {
  const __m512i minus = _mm512_set1_epi8(static_cast<char>(-centroids));
  const __m128i levels = _mm_cvtsi32_si128(log2_of(centroids));
#pragma GCC unroll 4
  for (int32_t b = 0; b < kBlocks; ++b) key[b] = _mm512_set1_epi32(INT32_MIN);
  for (int32_t k = 0; k < centroids; ++k, words += groups + 1) {
    const __m512i tag = _mm512_set1_epi32(words[groups]);
    __m512i score[kBlocks];
#pragma GCC unroll 4
    for (int32_t b = 0; b < kBlocks; ++b) {
      score[b] = kDistance == Distance::kL1 ? tag : _mm512_setzero_si512();
    }
    for (int32_t g = 0; g < groups; ++g) {
      const __m512i c = _mm512_set1_epi32(words[g]);
#pragma GCC unroll 4
      for (int32_t b = 0; b < kBlocks; ++b) {
        const __m512i apart = _mm512_abs_epi8(_mm512_sub_epi8(c, x[g * kBlocks + b]));
        if constexpr (kDistance == Distance::kL1) {
          score[b] = _mm512_dpbusd_epi32(score[b], apart, minus);
        } else {
          score[b] = _mm512_max_epu8(score[b], apart);
        }
      }
    }
#pragma GCC unroll 4
    for (int32_t b = 0; b < kBlocks; ++b) {
      if constexpr (kDistance == Distance::kChebyshev) {
        __m512i most = _mm512_max_epu8(score[b], _mm512_srli_epi32(score[b], 16));
        most = _mm512_max_epu8(most, _mm512_srli_epi32(most, 8));
        most = _mm512_and_si512(most, _mm512_set1_epi32(0xff));
        score[b] = _mm512_sub_epi32(tag, _mm512_sll_epi32(most, levels));
      }
      key[b] = _mm512_max_epi32(key[b], score[b]);
    }
  }
}

// Keys -> indices of the lookup, into byte b % 4 of the dwords.
template <int kBlocks>
void store_codes(const __m512i* key, int32_t centroids, int32_t codebook, uint8_t* to) {
  const __m512i code_bits = _mm512_set1_epi32(centroids - 1);
  const __m128i slot = _mm_cvtsi32_si128(8 * (codebook % kBooks));
#pragma GCC unroll 4
  for (int32_t i = 0; i < kBlocks; ++i) {
    __m512i code = _mm512_andnot_si512(key[i], code_bits);  // K - 1 - (K - 1 - k)
    if (centroids > 16) {
      const __m512i low = _mm512_and_si512(code, _mm512_set1_epi32(15));
      code = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_sub_epi32(code, low), 2));
    }
    const __m512i others =
        codebook % kBooks ? _mm512_loadu_si512(to + 64 * i) : _mm512_set1_epi32(kBookBits);
    _mm512_storeu_si512(to + 64 * i, _mm512_or_si512(others, _mm512_sll_epi32(code, slot)));
  }
}

bool all_single(const Quad* quads, int32_t groups) {
  int32_t sources = 0;
  for (int32_t g = 0; g < groups; ++g) sources += quads[g].sources;
  return sources == groups;
}

// Codebooks first .. last - 1; kGroups == 0: any number of quads.
template <int kGroups, int kBlocks>
void nearest_codebooks(const PqShape& s, const uint8_t* packed, const Patch& p, int32_t first,
                       int32_t last, uint8_t* codes) {
  const Cut cut = cut_of(s);
  Rows rows;
  find_rows(p, rows);
  ByteRows bytes;
  find_byte_rows(p, bytes);
  QuadFinder finder(p, s.depth, s.taps, s.dim, cut.size, 63 - rows.reach);
  const __m128i up = _mm_cvtsi32_si128(cut.up);
  const size_t codebook_words = nearest_words(s);
  const int32_t* words = reinterpret_cast<const int32_t*>(packed) + first * codebook_words;
  for (int32_t b = first; b < last; ++b, words += codebook_words) {
    const uint8_t* planes;
    const Quad* quads;
    finder.next(b, planes, quads);
    __m512i key[kBlocks];
    uint8_t* const to = codes_at(codes, b, kBlocks);
    if constexpr (kGroups == 0) {
      __m512i x[16 * kBlocks];
      gather_quads(planes, quads, cut.groups, rows, bytes, reinterpret_cast<uint8_t*>(x));
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
        uint8_t gathered[kGroups * kBlocks * 64];
        gather_quads(planes, quads, kGroups, rows, bytes, gathered);
#pragma GCC unroll 16
        for (int32_t i = 0; i < kGroups * kBlocks; ++i)
          x[i] = _mm512_loadu_si512(gathered + 64 * i);
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
      return nearest_codebooks<kGroups, 1>(s, packed, p, first, last, codes);
    case 2:
      return nearest_codebooks<kGroups, 2>(s, packed, p, first, last, codes);
    case 3:
      return nearest_codebooks<kGroups, 3>(s, packed, p, first, last, codes);
    default:
      return nearest_codebooks<kGroups, 4>(s, packed, p, first, last, codes);
  }
}

template <Distance kDistance, int kBlocks>
void apart_codebooks(const PqShape& s, const uint8_t* packed, const Patch& p, int32_t first,
                     int32_t last, uint8_t* codes) {
  const Cut cut = cut_of(s);
  Rows rows;
  find_rows(p, rows);
  ByteRows bytes;
  find_byte_rows(p, bytes);
  QuadFinder finder(p, s.depth, s.taps, s.dim, cut.size, 63 - rows.reach);
  const size_t codebook_words = nearest_words(s);
  const int32_t* words = reinterpret_cast<const int32_t*>(packed) + first * codebook_words;
  for (int32_t b = first; b < last; ++b, words += codebook_words) {
    const uint8_t* planes;
    const Quad* quads;
    finder.next(b, planes, quads);
    __m512i x[16 * kBlocks], key[kBlocks];
    gather_quads(planes, quads, cut.groups, rows, bytes, reinterpret_cast<uint8_t*>(x));
    for (int32_t g = 0; g < cut.groups; ++g) {
      const __m512i there = _mm512_set1_epi32(words[g]);
#pragma GCC unroll 4
      for (int32_t i = 0; i < kBlocks; ++i) {
        x[g * kBlocks + i] = _mm512_and_si512(x[g * kBlocks + i], there);
      }
    }
    search_apart<kDistance, kBlocks>(x, words + cut.groups, cut.groups, s.centroids, key);
    store_codes<kBlocks>(key, s.centroids, b, codes_at(codes, b, kBlocks));
  }
}

template <Distance kDistance>
void apart_blocks(const PqShape& s, const uint8_t* packed, const Patch& p, int32_t first,
                  int32_t last, uint8_t* codes) {
  switch (row_blocks(p.rows)) {
    case 1:
      return apart_codebooks<kDistance, 1>(s, packed, p, first, last, codes);
    case 2:
      return apart_codebooks<kDistance, 2>(s, packed, p, first, last, codes);
    case 3:
      return apart_codebooks<kDistance, 3>(s, packed, p, first, last, codes);
    default:
      return apart_codebooks<kDistance, 4>(s, packed, p, first, last, codes);
  }
}

void encode_nearest(const PqShape& s, const uint8_t* packed, const Patch& p, int32_t first,
                    int32_t last, uint8_t* codes) {
  if (s.distance == Distance::kL1) {
    return apart_blocks<Distance::kL1>(s, packed, p, first, last, codes);
  }
  if (s.distance == Distance::kChebyshev) {
    return apart_blocks<Distance::kChebyshev>(s, packed, p, first, last, codes);
  }
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

// --- both -----------------------------------------------------------------------------------

size_t encoder_bytes(const PqShape& s) {
  if (s.encoder == Encoder::kTree) return tree_bytes(s);
  return static_cast<size_t>(s.codebooks) * nearest_words(s) * sizeof(int32_t);
}

size_t code_bytes(const PqShape& s) {
  return static_cast<size_t>(ceil_div(s.codebooks, kBooks)) * kBooks * kRows;
}

void encode(const PqShape& s, const uint8_t* packed, const Patch& p, int32_t first, int32_t last,
            uint8_t* codes) {
  if (s.encoder == Encoder::kNearest) return encode_nearest(s, packed, p, first, last, codes);
  encode_tree(s, packed, p, first, last, codes);
}

void unpack_codes(const PqShape& s, const uint8_t* codes, int32_t rows, uint8_t* out,
                  size_t stride) {
  const int32_t blocks = row_blocks(rows);
  alignas(64) uint8_t planes[64];
  for (int32_t i = 0; i < 64; ++i) planes[i] = static_cast<uint8_t>(4 * (i % 16) + i / 16);
  const __m512i order = _mm512_load_si512(planes);
  for (int32_t b = 0; b < s.codebooks; b += kBooks) {
    for (int32_t i = 0; i < blocks; ++i, codes += 64) {
      const __m512i x = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(codes));
      const __m512i low = _mm512_and_si512(x, _mm512_set1_epi8(15));
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(x, 2), _mm512_set1_epi8(0x30));
      _mm512_store_si512(planes, _mm512_or_si512(low, high));
      for (int32_t j = 0; j < kBooks && b + j < s.codebooks; ++j) {
        const __m128i line = _mm_load_si128(reinterpret_cast<const __m128i*>(planes + 16 * j));
        uint8_t* const to = out + book_of(s, b / kBooks, j) * stride + 16 * i;
        _mm_mask_storeu_epi8(to, lane_mask(rows - 16 * i), line);
      }
    }
  }
}

void unpack_units(const PqShape& s, const uint8_t* codes, int32_t rows, uint8_t* out,
                  size_t stride) {
  const int32_t blocks = row_blocks(rows);
  const __mmask16 last = lane_mask(rows - 16 * (blocks - 1));
  for (int32_t b = 0; b < s.codebooks; b += kBooks, out += stride) {
    for (int32_t i = 0; i < blocks; ++i, codes += 64) {
      const __mmask16 mask = i + 1 < blocks ? __mmask16{0xffff} : last;
      _mm512_mask_storeu_epi32(out + 64 * i, mask, _mm512_loadu_si512(codes));
    }
  }
}

// 16 rows of units: consecutive, within 64 or 128 bytes, or anywhere.
struct UnitRows {
  Reach reach;  // kPlain, kSingle, kPair or kSegments
  int32_t base;
  __m512i index;  // in the 32 units from `base` on, or the offsets
};

UnitRows find_unit_rows(const int32_t* row, int32_t valid) {
  const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i offsets = _mm512_loadu_si512(row);
  const __m512i index = _mm512_srli_epi32(_mm512_sub_epi32(offsets, _mm512_set1_epi32(row[0])), 2);
  if (!_mm512_mask_cmpneq_epi32_mask(lane_mask(valid), index, iota)) {
    return {Reach::kPlain, row[0], index};
  }
  if (row[15] - row[0] < 64) return {Reach::kSingle, row[0], index};
  if (row[15] - row[0] < 128) return {Reach::kPair, row[0], index};
  return {Reach::kSegments, 0, offsets};
}

// Nothing but copies: a load and a store for four codebooks of 16 rows, where these are
// consecutive.
template <int kBlocks>
void gather_units(const PqShape& s, const Patch& p, int32_t first, int32_t last, uint8_t* codes) {
  UnitRows rows[kBlocks];
  for (int32_t i = 0; i < kBlocks; ++i) {
    rows[i] = find_unit_rows(p.row + 16 * i, p.rows - 16 * i);
  }
  const uint8_t* plane = p.planes + first / kBooks / s.parts * p.plane;
  int32_t tap = first / kBooks % s.parts;
  for (int32_t b = first; b < last; b += kBooks) {
    uint8_t* const to = codes_at(codes, b, kBlocks);
    const uint8_t* const at = plane + p.tap[tap];
#pragma GCC unroll 4
    for (int32_t i = 0; i < kBlocks; ++i) {
      const uint8_t* const from = at + rows[i].base;
      __m512i x;
      if (rows[i].reach == Reach::kPlain) {
        x = _mm512_loadu_si512(from);
      } else if (rows[i].reach == Reach::kSingle) {
        x = _mm512_permutexvar_epi32(rows[i].index, _mm512_loadu_si512(from));
      } else if (rows[i].reach == Reach::kPair) {
        x = _mm512_permutex2var_epi32(_mm512_loadu_si512(from), rows[i].index,
                                      _mm512_loadu_si512(from + 64));
      } else {
        x = _mm512_i32gather_epi32(rows[i].index, at, 1);
      }
      _mm512_storeu_si512(to + 64 * i, x);
    }
    if (++tap == s.parts) {
      tap = 0;
      plane += p.plane;
    }
  }
}

// Of bytes: four codebooks are a quad, like four entries of a row. Limited by its loads: one for
// four codebooks of 16 rows where their taps lie within a line.
void gather_codes(const PqShape& s, const Patch& p, int32_t first, int32_t last, uint8_t* codes) {
  if (code_unit(s) == kBooks) {
    switch (row_blocks(p.rows)) {
      case 1:
        return gather_units<1>(s, p, first, last, codes);
      case 2:
        return gather_units<2>(s, p, first, last, codes);
      case 3:
        return gather_units<3>(s, p, first, last, codes);
      default:
        return gather_units<4>(s, p, first, last, codes);
    }
  }
  Rows rows;
  find_rows(p, rows);
  ByteRows bytes;
  find_byte_rows(p, bytes);
  QuadFinder finder(p, s.codebooks, s.parts, kBooks, kBooks, 63 - rows.reach);
  const __m512i book = _mm512_set1_epi32(kBookBits), four = _mm512_set1_epi8(15);
  for (int32_t b = first; b < last; b += kBooks) {
    const uint8_t* planes;
    const Quad* quad;
    finder.next(b / kBooks, planes, quad);
    uint8_t* const to = codes_at(codes, b, rows.blocks);
    __m512i x[4];
    gather_blocks(planes, *quad, rows, bytes, x);
#pragma GCC unroll 4
    for (int32_t i = 0; i < 4; ++i) {
      if (i >= rows.blocks) break;
      if (s.centroids > 16) {  // the upper bits to their places: no byte reaches its neighbour
        const __m512i low = _mm512_and_si512(x[i], four);
        x[i] = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_sub_epi32(x[i], low), 2));
      }
      _mm512_storeu_si512(to + 64 * i, _mm512_or_si512(x[i], book));
    }
  }
}

}  // namespace
}  // namespace lutra
