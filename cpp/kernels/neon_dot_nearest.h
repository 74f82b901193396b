// NEON with dot products: the nearest centroid. Private to neon_dot.cc.
//
// Four centroids at a time: a register has four entries of each of them, and udot by lane takes
// these with the same entries of 4 rows. So 16 dot products, 64 multiply-adds each, take five
// loads.
//
// A packed codebook: [4 centroids][-floor(|c|^2 / 2) in 32 bits | (4 centroids, 4 entries) for each
// four entries]
#pragma once

#include "neon_common.h"

namespace lutra {
namespace {

constexpr int32_t kKeyBits = 6;  // a key is score * 64 + 63 - k: max finds the lowest best k

LUTRA_INLINE int32_t value_quads(const PqShape& s) { return (s.dim + 3) / 4; }
LUTRA_INLINE size_t nearest_group(const PqShape& s) {
  return 16 + 16 * static_cast<size_t>(value_quads(s));
}
size_t nearest_bytes(const PqShape& s) {
  return static_cast<size_t>(s.codebooks) * (s.centroids / 4) * nearest_group(s);
}

// Entries beyond D are those of another entry, times 0; their part of |c|^2 remains.
void pack_nearest(const PqShape& s, const uint8_t* centroids, uint8_t* packed) {
  for (int32_t b = 0; b < s.codebooks; ++b) {
    for (int32_t k = 0; k < s.centroids; k += 4, packed += nearest_group(s)) {
      for (int32_t i = 0; i < 4; ++i, centroids += s.dim) {
        int32_t norm = 0;
        for (int32_t v = 0; v < s.dim; ++v) norm += int32_t{centroids[v]} * centroids[v];
        reinterpret_cast<int32_t*>(packed)[i] = -(norm >> 1);
        for (int32_t v = 0; v < 4 * value_quads(s); ++v) {
          const bool there = v < s.dim && b * s.dim + v < s.depth;
          packed[16 + v / 4 * 16 + 4 * i + v % 4] = there ? centroids[v] : uint8_t{0};
        }
      }
    }
  }
}

template <int kLane>
LUTRA_INLINE void add_product(uint32x4_t* s, const uint8x16_t* x, uint8x16_t c) {
  for (int32_t r = 0; r < 4; ++r) s[r] = vdotq_laneq_u32(s[r], x[r], c, kLane);
}
template <int... kLane>
LUTRA_INLINE void add_products(Lanes<kLane...>, uint32x4_t (*s)[4], const uint8x16_t* x,
                               uint8x16_t c) {
  (add_product<kLane>(s[kLane], x, c), ...);
}

// x: (quads, 16 rows, 4)
[[gnu::noinline]] uint8x16_t search(const PqShape& s, const uint8_t* codebook, const uint8_t* x) {
  int32x4_t best[4], last_bits = vdupq_n_s32((1 << kKeyBits) - 1);
  for (int32x4_t& b : best) b = vdupq_n_s32(INT32_MIN);
  for (int32_t k = 0; k < s.centroids; k += 4, codebook += nearest_group(s)) {
    const uint32_t* const initial = reinterpret_cast<const uint32_t*>(codebook);
    uint32x4_t score[4][4];
    for (int32_t i = 0; i < 4; ++i) {
      for (int32_t r = 0; r < 4; ++r) score[i][r] = vdupq_n_u32(initial[i]);
    }
    for (int32_t q = 0; q < value_quads(s); ++q) {
      const uint8x16_t rows[4] = {vld1q_u8(x + 64 * q), vld1q_u8(x + 64 * q + 16),
                                  vld1q_u8(x + 64 * q + 32), vld1q_u8(x + 64 * q + 48)};
      add_products(FourLanes(), score, rows, vld1q_u8(codebook + 16 + 16 * q));
    }
    for (int32_t i = 0; i < 4; ++i) {
      for (int32_t r = 0; r < 4; ++r) {
        const int32x4_t key = vsliq_n_s32(last_bits, vreinterpretq_s32_u32(score[i][r]), kKeyBits);
        best[r] = vmaxq_s32(best[r], key);
      }
      last_bits = vsubq_s32(last_bits, vdupq_n_s32(1));
    }
  }
  for (int32x4_t& b : best) b = vbicq_s32(vdupq_n_s32((1 << kKeyBits) - 1), b);  // 63 - (63 - k)
  return narrow_words(best);
}

// Codes of codebook b for the rows of a block.
LUTRA_INLINE uint8x16_t nearest(const PqShape& s, const uint8_t* packed, int32_t b,
                                const Rows& rows, const uint8_t* const* entries) {
  alignas(16) uint8_t x[16 * 64];
  with_rows(rows, [&](const auto& loader) {
    for (int32_t v = 0; v < s.dim; v += 4) {
      const auto entry = [&](int32_t i) { return entries[v + i < s.dim ? v + i : v]; };
      store_quads(x + 16 * v, loader.load(entry(0)), loader.load(entry(1)), loader.load(entry(2)),
                  loader.load(entry(3)));
    }
  });
  const size_t codebook = static_cast<size_t>(s.centroids / 4) * nearest_group(s);
  return search(s, packed + b * codebook, x);
}

}  // namespace
}  // namespace lutra
