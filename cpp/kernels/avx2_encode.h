// AVX2: codes of a tile, by nearest centroid or by tree. Private to avx2.cc.
//
// Codes: sub-tile after sub-tile (32 rows, or 16 if no more are left), each (codebooks, its rows).
#pragma once

#include "avx2_common.h"
#include "centred.h"

namespace lutra {
namespace {

LUTRA_INLINE int32_t padded_codebooks(const PqShape& s) { return round_up(s.codebooks, 2); }
LUTRA_INLINE uint8_t* sub_tile(const PqShape& s, uint8_t* codes, int32_t row) {
  return codes + static_cast<size_t>(padded_codebooks(s)) * row;
}

size_t code_bytes(const PqShape& s) { return static_cast<size_t>(padded_codebooks(s)) * kRows; }

// --- nearest centroid ----------------------------------------------------------------------------
//
// In 16 bits where centred.h says that the scores fit, else in 32.
//
// A packed codebook, in dwords: 1 if narrow scores fit, then
//   16 bits: [4 centroids][initial score twice | (c'_2i, c'_2i+1) twice for each pair i][4]
//   32 bits: [centroid][key | (c'_4i .. c'_4i+3) for each quad i]
// For the other distances: 1, then as for 16 bits, with c as it is and initial scores of 0.

constexpr int32_t kKeyBits = 6;  // a 32-bit key is score * 64 + 63 - k: max finds the lowest best k

LUTRA_INLINE int32_t value_pairs(const PqShape& s) { return (s.dim + 1) / 2; }
LUTRA_INLINE size_t codebook_words(const PqShape& s) {
  return 1 + static_cast<size_t>(s.centroids) * (1 + value_pairs(s));
}
LUTRA_INLINE int32_t tree_levels(const PqShape& s) { return 31 - __builtin_clz(s.centroids); }
LUTRA_INLINE size_t threshold_bytes(const PqShape& s) { return round_up(s.centroids, 16); }

size_t encoder_bytes(const PqShape& s) {
  if (s.encoder == Encoder::kNearest) return s.codebooks * codebook_words(s) * sizeof(int32_t);
  return s.codebooks * (tree_levels(s) * 2 * sizeof(int32_t) + threshold_bytes(s));
}

void pack_apart(const PqShape& s, const uint8_t* centroids, uint8_t* packed) {
  const int32_t pairs = value_pairs(s);
  for (int32_t b = 0; b < s.codebooks; ++b) {
    uint32_t* const to = reinterpret_cast<uint32_t*>(packed) + b * codebook_words(s);
    to[0] = 1;
    for (int32_t k = 0; k < s.centroids; ++k, centroids += s.dim) {
      uint32_t* const at = to + 1 + (k / 4) * 4 * (1 + pairs) + k % 4;
      at[0] = 0;
      for (int32_t i = 0; i < pairs; ++i) {
        const uint32_t second = 2 * i + 1 < s.dim ? centroids[2 * i + 1] : 0;
        at[4 * (1 + i)] = (centroids[2 * i] | second << 8) * 0x10001u;
      }
    }
  }
}

void pack_nearest(const PqShape& s, const uint8_t* centroids, uint8_t* packed) {
  if (s.distance != Distance::kL2) return pack_apart(s, centroids, packed);
  const int32_t pairs = value_pairs(s), quads = (s.dim + 3) / 4;
  Centred codebook;
  for (int32_t b = 0; b < s.codebooks; ++b) {
    const int32_t left = s.depth - b * s.dim, valid = left < s.dim ? left : s.dim;
    centre(s, centroids + static_cast<size_t>(b) * s.centroids * s.dim, valid, &codebook);
    uint32_t* const to = reinterpret_cast<uint32_t*>(packed) + b * codebook_words(s);
    to[0] = codebook.fits;
    for (int32_t k = 0; k < s.centroids; ++k) {
      if (codebook.fits) {
        uint32_t* const at = to + 1 + (k / 4) * 4 * (1 + pairs) + k % 4;
        at[0] = static_cast<uint16_t>(codebook.initial[k]) * 0x10001u;
        for (int32_t i = 0; i < pairs; ++i) {
          uint16_t pair;
          __builtin_memcpy(&pair, &codebook.c[k][2 * i], sizeof pair);
          at[4 * (1 + i)] = pair * 0x10001u;
        }
      } else {
        uint32_t* const at = to + 1 + k * (1 + quads);
        at[0] =
            static_cast<uint32_t>(codebook.initial[k] * (1 << kKeyBits) + (1 << kKeyBits) - 1 - k);
        __builtin_memcpy(at + 1, codebook.c[k], 4 * quads);
      }
    }
  }
}

// The values of a codebook's entries, two per 16-bit lane. 32 rows are two registers (rows
// 0..7, 16..23 and 8..15, 24..31), 16 rows are one.
template <int kHalves, typename Loader>
LUTRA_INLINE void load_pairs(const Loader& rows, const uint8_t* const* entries, int32_t dim,
                             __m256i (*x)[kHalves]) {
  for (int32_t v = 0; v < dim; v += 2) {
    const uint8_t* const next = entries[v + 1 < dim ? v + 1 : v];
    if constexpr (kHalves == 2) {
      const __m256i a = rows.wide(entries[v]), b = rows.wide(next);
      x[v / 2][0] = _mm256_unpacklo_epi8(a, b);
      x[v / 2][1] = _mm256_unpackhi_epi8(a, b);
    } else {
      const __m128i a = rows.half(entries[v]), b = rows.half(next);
      x[v / 2][0] = join(_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b));
    }
  }
}

// Masks or codes of the 16-bit lanes: as bytes for 32 rows, as they are for 16 rows.
template <int kHalves>
LUTRA_INLINE __m256i lane_bytes(const __m256i* v) {
  return kHalves == 2 ? _mm256_packs_epi16(v[0], v[kHalves - 1]) : v[0];
}
template <int kHalves>
LUTRA_INLINE void store_codes(uint8_t* to, __m256i code) {
  if constexpr (kHalves == 2) {
    store(to, code);
  } else {
    const __m256i words = _mm256_and_si256(code, _mm256_set1_epi16(0xff));
    const __m256i bytes = _mm256_packus_epi16(words, words);
    store_half(to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(bytes, 0x08)));
  }
}

// The best of a search so far: a knock-out among four centroids and the best before them. Their
// masks become bytes, so that codes of 32 rows are one register. (Of 16 rows, both bytes of a lane
// are the code.)
template <int kHalves>
struct Best {
  __m256i score[kHalves], code = _mm256_setzero_si256(), first = code;  // first: of the four

  LUTRA_INLINE Best() {
    for (__m256i& s : score) s = _mm256_set1_epi16(INT16_MIN);
  }
  LUTRA_INLINE void add(const __m256i (*s)[kHalves]) {
    __m256i m01[kHalves], m23[kHalves], m[kHalves], better[kHalves];
    for (int32_t h = 0; h < kHalves; ++h) {
      m01[h] = _mm256_cmpgt_epi16(s[1][h], s[0][h]);
      m23[h] = _mm256_cmpgt_epi16(s[3][h], s[2][h]);
      const __m256i s01 = _mm256_max_epi16(s[0][h], s[1][h]);
      const __m256i s23 = _mm256_max_epi16(s[2][h], s[3][h]);
      m[h] = _mm256_cmpgt_epi16(s23, s01);
      const __m256i top = _mm256_max_epi16(s01, s23);
      better[h] = _mm256_cmpgt_epi16(top, score[h]);
      score[h] = _mm256_max_epi16(score[h], top);
    }
    const __m256i c01 = _mm256_sub_epi8(first, lane_bytes<kHalves>(m01));
    const __m256i third = _mm256_add_epi8(first, _mm256_set1_epi8(2));
    const __m256i c23 = _mm256_sub_epi8(third, lane_bytes<kHalves>(m23));
    const __m256i c = _mm256_blendv_epi8(c01, c23, lane_bytes<kHalves>(m));
    code = _mm256_blendv_epi8(code, c, lane_bytes<kHalves>(better));
    first = _mm256_add_epi8(first, _mm256_set1_epi8(4));
  }
};

// Four centroids at a time. 32 rows: eight sums in registers; a load of x serves four
// multiply-adds, a broadcast two. Multiplications and additions limit it, about evenly.
template <int kHalves>
[[gnu::noinline]] __m256i search16(const uint32_t* codebook, int32_t pairs, int32_t centroids,
                                   const __m256i (*x)[kHalves]) {
  Best<kHalves> best;
  for (int32_t k = 0; k < centroids; k += 4) {
    __m256i s[4][kHalves];
    for (int32_t j = 0; j < 4; ++j) {
      for (__m256i& h : s[j]) h = broadcast_word(codebook + j);
    }
    codebook += 4;
    for (int32_t i = 0; i < pairs; ++i, codebook += 4) {
      for (int32_t j = 0; j < 4; ++j) {
        const __m256i c = broadcast_word(codebook + j);
        for (int32_t h = 0; h < kHalves; ++h) {
          s[j][h] = _mm256_add_epi16(s[j][h], _mm256_maddubs_epi16(x[i][h], c));
        }
      }
    }
    best.add(s);
  }
  return best.code;
}

// 16 rows would be limited by loads; of 9 values (3x3) x fits in registers.
[[gnu::noinline]] __m256i search16_narrow9(const uint32_t* codebook, int32_t centroids,
                                           const __m256i (*pairs)[1]) {
  __m256i x[5];
  for (int32_t i = 0; i < 5; ++i) keep(x[i] = pairs[i][0]);
  Best<1> best;
  for (int32_t k = 0; k < centroids; k += 4) {
    __m256i s[4][1];
    for (int32_t j = 0; j < 4; ++j, ++codebook) keep(s[j][0] = broadcast_word(codebook));
#pragma GCC unroll 5
    for (int32_t i = 0; i < 5; ++i) {
      for (int32_t j = 0; j < 4; ++j, ++codebook) {
        const __m256i part = _mm256_maddubs_epi16(x[i], broadcast_word(codebook));
        keep(s[j][0] = _mm256_add_epi16(s[j][0], part));
      }
    }
    best.add(s);
  }
  return best.code;
}

// Four values per dword, 8 rows a register. A pair of products cannot saturate (2 * 127 * 128).
template <int kHalves>
[[gnu::noinline]] __m256i search32(const uint32_t* codebook, int32_t pairs, int32_t dim,
                                   int32_t centroids, const __m256i (*x)[kHalves]) {
  const int32_t quads = (dim + 3) / 4;
  __m256i q[16][2 * kHalves];
  for (int32_t i = 0; i < quads; ++i) {
    const __m256i* const a = x[2 * i];
    const __m256i* const b = x[2 * i + 1 < pairs ? 2 * i + 1 : 2 * i];  // or times zero
    for (int32_t h = 0; h < kHalves; ++h) {
      q[i][2 * h] = _mm256_unpacklo_epi16(a[h], b[h]);
      q[i][2 * h + 1] = _mm256_unpackhi_epi16(a[h], b[h]);
    }
  }
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i best[2 * kHalves];
  for (__m256i& b : best) b = _mm256_set1_epi32(INT32_MIN);
  for (int32_t k = 0; k < centroids; ++k) {
    __m256i s[2 * kHalves];
    for (__m256i& v : s) v = _mm256_setzero_si256();
    const __m256i key = broadcast_word(codebook++);
    for (int32_t i = 0; i < quads; ++i) {
      const __m256i c = broadcast_word(codebook++);
      for (int32_t j = 0; j < 2 * kHalves; ++j) {
        const __m256i part = _mm256_madd_epi16(_mm256_maddubs_epi16(q[i][j], c), ones);
        s[j] = _mm256_add_epi32(s[j], part);
      }
    }
    for (int32_t j = 0; j < 2 * kHalves; ++j) {
      best[j] = _mm256_max_epi32(best[j], _mm256_add_epi32(_mm256_slli_epi32(s[j], kKeyBits), key));
    }
  }
  const __m256i low_bits = _mm256_set1_epi32((1 << kKeyBits) - 1);
  for (__m256i& b : best) b = _mm256_andnot_si256(b, low_bits);  // 63 - (63 - k)
  __m256i words[kHalves];
  for (int32_t h = 0; h < kHalves; ++h) {
    words[h] = _mm256_packs_epi32(best[2 * h], best[2 * h + 1]);
  }
  return lane_bytes<kHalves>(words);
}

// Sums of absolute differences, or the largest of them. Bytes of at most 127 differ by what fits a
// signed byte; the score is the distance below zero, in 16 bits (at most 64 * 127).
template <int kHalves, Distance kDistance>
[[gnu::noinline]] __m256i search_apart(const uint32_t* codebook, int32_t pairs, int32_t centroids,
                                       const __m256i (*x)[kHalves]) {
  const __m256i ones = _mm256_set1_epi8(1), low = _mm256_set1_epi16(0xff);
  Best<kHalves> best;
  for (int32_t k = 0; k < centroids; k += 4) {
    __m256i s[4][kHalves];
    for (auto& score : s) {
      for (__m256i& h : score) h = _mm256_setzero_si256();
    }
    codebook += 4;
    for (int32_t i = 0; i < pairs; ++i, codebook += 4) {
      for (int32_t j = 0; j < 4; ++j) {
        const __m256i c = broadcast_word(codebook + j);
        for (int32_t h = 0; h < kHalves; ++h) {
          const __m256i apart = _mm256_abs_epi8(_mm256_sub_epi8(x[i][h], c));
          if constexpr (kDistance == Distance::kL1) {
            s[j][h] = _mm256_sub_epi16(s[j][h], _mm256_maddubs_epi16(apart, ones));
          } else {
            s[j][h] = _mm256_max_epu8(s[j][h], apart);
          }
        }
      }
    }
    if constexpr (kDistance == Distance::kChebyshev) {
      for (auto& score : s) {
        for (__m256i& h : score) {
          const __m256i most = _mm256_max_epu8(h, _mm256_srli_epi16(h, 8));
          h = _mm256_sub_epi16(_mm256_setzero_si256(), _mm256_and_si256(most, low));
        }
      }
    }
    best.add(s);
  }
  return best.code;
}

// Entries that a sub-vector does not have count as 0; load_pairs() gives them any value.
template <int kHalves>
LUTRA_INLINE void clear_pairs(int32_t valid, int32_t pairs, __m256i (*x)[kHalves]) {
  for (int32_t i = valid / 2; i < pairs; ++i) {
    const __m256i there = _mm256_set1_epi16(2 * i < valid ? 0xff : 0);
    for (__m256i& h : x[i]) h = _mm256_and_si256(h, there);
  }
}

// `valid` entries of the sub-vector exist.
template <int kHalves>
void nearest(const PqShape& s, const uint32_t* codebook, const Rows& rows,
             const uint8_t* const* entries, int32_t valid, uint8_t* codes) {
  const int32_t pairs = value_pairs(s), k = s.centroids;
  __m256i x[32][kHalves];
  with_rows(rows, [&](const auto& loader) {
    if (s.dim == 9) return load_pairs<kHalves>(loader, entries, 9, x);  // unrolled
    load_pairs<kHalves>(loader, entries, s.dim, x);
  });
  if (s.distance != Distance::kL2) {
    clear_pairs<kHalves>(valid, pairs, x);
    auto* const search = s.distance == Distance::kL1 ? search_apart<kHalves, Distance::kL1>
                                                     : search_apart<kHalves, Distance::kChebyshev>;
    return store_codes<kHalves>(codes, search(codebook + 1, pairs, k, x));
  }
  if (!codebook[0]) {
    store_codes<kHalves>(codes, search32<kHalves>(codebook + 1, pairs, s.dim, k, x));
    return;
  }
  if constexpr (kHalves == 1) {
    if (pairs == 5) return store_codes<1>(codes, search16_narrow9(codebook + 1, k, x));
  }
  store_codes<kHalves>(codes, search16<kHalves>(codebook + 1, pairs, k, x));
}

void encode_nearest(const PqShape& s, const uint8_t* packed, const Patch& p, const Rows* rows,
                    int32_t first, int32_t last, uint8_t* codes) {
  Entries walk(p, s.taps, first * s.dim);
  const uint8_t* entries[64];
  for (int32_t b = first; b < last; ++b) {
    for (int32_t v = 0; v < s.dim; ++v) {
      entries[v] = b * s.dim + v < s.depth ? walk.next() : entries[0];  // or times zero
    }
    const int32_t left = s.depth - b * s.dim, valid = left < s.dim ? left : s.dim;
    const uint32_t* const codebook =
        reinterpret_cast<const uint32_t*>(packed) + b * codebook_words(s);
    for (int32_t row = 0; row < p.rows; row += kSubRows) {
      uint8_t* const to = sub_tile(s, codes, row);
      if (narrow(p.rows - row)) {
        nearest<1>(s, codebook, rows[row / kSubRows], entries, valid, to + b * kRowBlock);
      } else {
        nearest<2>(s, codebook, rows[row / kSubRows], entries, valid, to + b * kSubRows);
      }
    }
  }
}

// --- tree ----------------------------------------------------------------------------------------
//
// The path is a node's number in the heap that begins with 1: path = 2 path + bit. Its low four
// bits index 16 bytes of thresholds: one register holds levels 0..3, one level 4, two level 5.
//
// Packed: (codebooks, levels) pairs of the split's plane and tap, then (codebooks, 16 or K)
// thresholds in heap order, less 1: x >= t is x > t - 1, for which there is a signed comparison.

void pack_tree(const PqShape& s, const int32_t* splits, const uint8_t* thresholds,
               uint8_t* packed) {
  const int32_t count = s.codebooks * tree_levels(s);
  int32_t* const to = reinterpret_cast<int32_t*>(packed);
  for (int32_t i = 0; i < count; ++i) {
    to[2 * i] = splits[i] / s.taps;
    to[2 * i + 1] = splits[i] % s.taps;
  }
  int8_t* rest = reinterpret_cast<int8_t*>(to + 2 * count);
  for (int32_t b = 0; b < s.codebooks; ++b, thresholds += s.centroids - 1) {
    for (int32_t i = 0; i < static_cast<int32_t>(threshold_bytes(s)); ++i) {
      const int32_t t = i > 0 && i < s.centroids ? thresholds[i - 1] : 0;
      *rest++ = static_cast<int8_t>((t < 128 ? t : 128) - 1);
    }
  }
}

template <int kLevels>
LUTRA_INLINE __m256i descend(const __m256i* x, const __m256i* thresholds) {
  __m256i path = _mm256_set1_epi8(1);
  for (int32_t l = 0; l < kLevels; ++l) {
    __m256i t;
    if (l < 5) {
      t = _mm256_shuffle_epi8(thresholds[l / 4], path);
    } else {  // 32..63: bit 7 set, and so zero, outside its own half
      const __m256i low = _mm256_add_epi8(path, _mm256_set1_epi8(0x70 - 32));
      const __m256i high = _mm256_sub_epi8(path, _mm256_set1_epi8(48));
      t = _mm256_or_si256(_mm256_shuffle_epi8(thresholds[2], low),
                          _mm256_shuffle_epi8(thresholds[3], high));
    }
    path = _mm256_sub_epi8(_mm256_add_epi8(path, path), _mm256_cmpgt_epi8(x[l], t));
  }
  return _mm256_and_si256(path, _mm256_set1_epi8((1 << kLevels) - 1));
}

constexpr int32_t kTreeBooks = 32;  // whose splits' addresses are found at a time

// Codes of `count` codebooks for 32 rows; at: (codebooks, levels) addresses.
template <int kLevels, typename Loader>
LUTRA_INLINE void tree_wide(const Loader& rows, const uint8_t* const* at, const uint8_t* thresholds,
                            int32_t count, uint8_t* codes) {
  constexpr int32_t kTables = kLevels < 4 ? 1 : 1 << (kLevels - 4);  // registers of thresholds
  for (int32_t b = 0; b < count; ++b, at += kLevels, thresholds += 16 * kTables) {
    __m256i x[kLevels], t[kTables];
    for (int32_t l = 0; l < kLevels; ++l) x[l] = rows.wide(at[l]);
    for (int32_t i = 0; i < kTables; ++i) t[i] = broadcast_half(thresholds + 16 * i);
    store(codes + b * kSubRows, descend<kLevels>(x, t));
  }
}

// The same for 16 rows, with two codebooks in the lanes.
template <int kLevels, typename Loader>
LUTRA_INLINE void tree_narrow(const Loader& rows, const uint8_t* const* at,
                              const uint8_t* thresholds, int32_t count, uint8_t* codes) {
  constexpr int32_t kTables = kLevels < 4 ? 1 : 1 << (kLevels - 4);
  for (int32_t b = 0; b < count; b += 2, at += 2 * kLevels, thresholds += 32 * kTables) {
    const int32_t next = b + 1 < count;  // else the last one twice
    __m256i x[kLevels], t[kTables];
    for (int32_t l = 0; l < kLevels; ++l) {
      x[l] = join(rows.half(at[l]), rows.half(at[next * kLevels + l]));
    }
    for (int32_t i = 0; i < kTables; ++i) {
      t[i] =
          join(load_half(thresholds + 16 * i), load_half(thresholds + 16 * (next * kTables + i)));
    }
    const __m256i code = descend<kLevels>(x, t);
    if (next) {
      store(codes + b * kRowBlock, code);
    } else {
      store_half(codes + b * kRowBlock, _mm256_castsi256_si128(code));
    }
  }
}

template <int kLevels>
void encode_tree(const PqShape& s, const uint8_t* packed, const Patch& p, const Rows* rows,
                 int32_t first, int32_t last, uint8_t* codes) {
  const int32_t* const splits = reinterpret_cast<const int32_t*>(packed);
  const uint8_t* const thresholds =
      packed + static_cast<size_t>(s.codebooks) * kLevels * 2 * sizeof(int32_t);
  const uint8_t* at[kTreeBooks * kLevels];
  for (int32_t b = first; b < last; b += kTreeBooks) {
    const int32_t count = last - b < kTreeBooks ? last - b : kTreeBooks;
    for (int32_t i = 0; i < count * kLevels; ++i) {
      const int32_t* const split = splits + 2 * (b * kLevels + i);
      at[i] = p.planes + split[0] * p.plane + p.tap[split[1]];
    }
    const uint8_t* const from = thresholds + b * threshold_bytes(s);
    for (int32_t row = 0; row < p.rows; row += kSubRows) {
      uint8_t* const to = sub_tile(s, codes, row);
      with_rows(rows[row / kSubRows], [&](const auto& loader) {
        if (narrow(p.rows - row)) {
          tree_narrow<kLevels>(loader, at, from, count, to + b * kRowBlock);
        } else {
          tree_wide<kLevels>(loader, at, from, count, to + b * kSubRows);
        }
      });
    }
  }
}

void encode(const PqShape& s, const uint8_t* packed, const Patch& p, int32_t first, int32_t last,
            uint8_t* codes) {
  Rows rows[kRows / kSubRows];
  for (int32_t row = 0; row < p.rows; row += kSubRows) find_rows(p, row, &rows[row / kSubRows]);
  if (s.encoder == Encoder::kNearest) {
    return encode_nearest(s, packed, p, rows, first, last, codes);
  }
  auto* const run = s.centroids == 8    ? encode_tree<3>
                    : s.centroids == 16 ? encode_tree<4>
                    : s.centroids == 32 ? encode_tree<5>
                                        : encode_tree<6>;
  run(s, packed, p, rows, first, last, codes);
}

void unpack_codes(const PqShape& s, const uint8_t* codes, int32_t rows, uint8_t* out,
                  size_t stride) {
  for (int32_t row = 0; row < rows; row += kSubRows) {
    const int32_t left = rows - row, width = narrow(left) ? kRowBlock : kSubRows;
    const int32_t count = left < width ? left : width;
    const uint8_t* from = codes + static_cast<size_t>(padded_codebooks(s)) * row;
    for (int32_t b = 0; b < s.codebooks; ++b, from += width) {
      for (int32_t r = 0; r < count; ++r) out[b * stride + row + r] = from[r];
    }
  }
}

int32_t code_unit(const PqShape&) { return 1; }

void unpack_units(const PqShape& s, const uint8_t* codes, int32_t rows, uint8_t* out,
                  size_t stride) {
  unpack_codes(s, codes, rows, out, stride);
}

void gather_codes(const PqShape& s, const Patch& p, int32_t first, int32_t last, uint8_t* codes) {
  for (int32_t row = 0; row < p.rows; row += kSubRows) {
    Rows rows;
    find_rows(p, row, &rows);
    uint8_t* const to = sub_tile(s, codes, row);
    with_rows(rows, [&](const auto& loader) {
      Entries entries(p, s.parts, first);
      if (narrow(p.rows - row)) {
        for (int32_t b = first; b < last; ++b) {
          store_half(to + b * kRowBlock, loader.half(entries.next()));
        }
      } else {
        for (int32_t b = first; b < last; ++b) {
          store(to + b * kSubRows, loader.wide(entries.next()));
        }
      }
    });
  }
}

}  // namespace
}  // namespace lutra
