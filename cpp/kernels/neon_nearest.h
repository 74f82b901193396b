// NEON without dot products: the nearest centroid. Private to neon.cc.
//
// Eight centroids at a time: a register has one entry of each of them, in 16 bits, and mla by lane
// multiplies it with that entry of 8 rows. So 16 multiply-adds take three loads, and the loop runs
// over any number of entries. In 16 bits where centred.h says that the scores fit, else in 32.
//
// A packed codebook, in words of 16 bits: 1 if narrow scores fit, 7 x 0, then
//   [8 centroids][initial scores in 32 bits | (c'_v of the eight) for each entry v]
#pragma once

#include "centred.h"
#include "neon_common.h"

namespace lutra {
namespace {

LUTRA_INLINE size_t nearest_group(const PqShape& s) { return 16 + 8 * static_cast<size_t>(s.dim); }
LUTRA_INLINE size_t nearest_words(const PqShape& s) {
  return 8 + static_cast<size_t>(s.centroids / 8) * nearest_group(s);
}
size_t nearest_bytes(const PqShape& s) { return s.codebooks * nearest_words(s) * sizeof(int16_t); }

void pack_nearest(const PqShape& s, const uint8_t* centroids, uint8_t* packed) {
  Centred codebook;
  for (int32_t b = 0; b < s.codebooks; ++b) {
    const int32_t left = s.depth - b * s.dim, valid = left < s.dim ? left : s.dim;
    centre(s, centroids + static_cast<size_t>(b) * s.centroids * s.dim, valid, &codebook);
    int16_t* to = reinterpret_cast<int16_t*>(packed) + b * nearest_words(s);
    for (int32_t i = 0; i < 8; ++i) to[i] = i == 0 && codebook.fits ? 1 : 0;
    to += 8;
    for (int32_t k = 0; k < s.centroids; k += 8, to += nearest_group(s)) {
      for (int32_t i = 0; i < 8; ++i) {
        reinterpret_cast<int32_t*>(to)[i] = codebook.initial[k + i];
        for (int32_t v = 0; v < s.dim; ++v) to[16 + 8 * v + i] = codebook.c[k + i][v];
      }
    }
  }
}

// Entries of 16 rows, in 16 bits.
using Values = int16x8_t[2];

template <typename Loader>
LUTRA_INLINE void load_values(const Loader& rows, const uint8_t* const* entries, int32_t dim,
                              Values* x) {
  for (int32_t v = 0; v < dim; ++v) {
    const uint8x16_t bytes = rows.load(entries[v]);
    x[v][0] = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
    x[v][1] = vreinterpretq_s16_u16(vmovl_high_u8(bytes));
  }
}

template <int kLane>
LUTRA_INLINE void add_product(int16x8_t* s, int16x8_t x0, int16x8_t x1, int16x8_t c) {
  s[0] = vmlaq_laneq_s16(s[0], x0, c, kLane);
  s[1] = vmlaq_laneq_s16(s[1], x1, c, kLane);
}
template <int... kLane>
LUTRA_INLINE void add_products(Lanes<kLane...>, int16x8_t (*s)[2], int16x8_t x0, int16x8_t x1,
                               int16x8_t c) {
  (add_product<kLane>(s[kLane], x0, x1, c), ...);
}

[[gnu::noinline]] uint8x16_t search16(const PqShape& s, const int16_t* codebook, const Values* x) {
  int16x8_t best[2] = {vdupq_n_s16(INT16_MIN), vdupq_n_s16(INT16_MIN)};
  int16x8_t code[2] = {vdupq_n_s16(0), vdupq_n_s16(0)}, index = vdupq_n_s16(0);
  for (int32_t k = 0; k < s.centroids; k += 8, codebook += nearest_group(s)) {
    const int32_t* const initial = reinterpret_cast<const int32_t*>(codebook);
    int16x8_t score[8][2];
    for (int32_t i = 0; i < 8; ++i) {
      score[i][0] = score[i][1] = vdupq_n_s16(static_cast<int16_t>(initial[i]));
    }
    for (int32_t v = 0; v < s.dim; ++v) {
      add_products(EightLanes(), score, x[v][0], x[v][1], vld1q_s16(codebook + 16 + 8 * v));
    }
    for (int32_t i = 0; i < 8; ++i) {
      for (int32_t h = 0; h < 2; ++h) {
        code[h] = vbslq_s16(vcgtq_s16(score[i][h], best[h]), index, code[h]);
        best[h] = vmaxq_s16(best[h], score[i][h]);
      }
      index = vaddq_s16(index, vdupq_n_s16(1));
    }
  }
  return vreinterpretq_u8_s8(vmovn_high_s16(vmovn_s16(code[0]), code[1]));
}

template <int kLane>
LUTRA_INLINE void add_wide_product(int32x4_t* s, int16x8_t x, int16x8_t c) {
  s[0] = vmlal_laneq_s16(s[0], vget_low_s16(x), c, kLane);
  s[1] = vmlal_high_laneq_s16(s[1], x, c, kLane);
}
template <int... kLane>
LUTRA_INLINE void add_wide_products(Lanes<kLane...>, int32x4_t (*s)[2], int16x8_t x, int16x8_t c) {
  (add_wide_product<kLane>(s[kLane], x, c), ...);
}

[[gnu::noinline]] uint8x16_t search32(const PqShape& s, const int16_t* first, const Values* x) {
  int32x4_t code[4];
  for (int32_t h = 0; h < 2; ++h) {  // 8 rows
    const int16_t* codebook = first;
    int32x4_t best[2] = {vdupq_n_s32(INT32_MIN), vdupq_n_s32(INT32_MIN)}, index = vdupq_n_s32(0);
    code[2 * h] = code[2 * h + 1] = index;
    for (int32_t k = 0; k < s.centroids; k += 8, codebook += nearest_group(s)) {
      const int32_t* const initial = reinterpret_cast<const int32_t*>(codebook);
      int32x4_t score[8][2];
      for (int32_t i = 0; i < 8; ++i) score[i][0] = score[i][1] = vdupq_n_s32(initial[i]);
      for (int32_t v = 0; v < s.dim; ++v) {
        add_wide_products(EightLanes(), score, x[v][h], vld1q_s16(codebook + 16 + 8 * v));
      }
      for (int32_t i = 0; i < 8; ++i) {
        for (int32_t q = 0; q < 2; ++q) {
          int32x4_t& to = code[2 * h + q];
          to = vbslq_s32(vcgtq_s32(score[i][q], best[q]), index, to);
          best[q] = vmaxq_s32(best[q], score[i][q]);
        }
        index = vaddq_s32(index, vdupq_n_s32(1));
      }
    }
  }
  return narrow_words(code);
}

// Codes of codebook b for the rows of a block.
LUTRA_INLINE uint8x16_t nearest(const PqShape& s, const uint8_t* packed, int32_t b,
                                const Rows& rows, const uint8_t* const* entries) {
  const int16_t* const codebook =
      reinterpret_cast<const int16_t*>(packed) + static_cast<size_t>(b) * nearest_words(s);
  Values x[64];
  with_rows(rows, [&](const auto& loader) { load_values(loader, entries, s.dim, x); });
  return codebook[0] != 0 ? search16(s, codebook + 8, x) : search32(s, codebook + 8, x);
}

}  // namespace
}  // namespace lutra
