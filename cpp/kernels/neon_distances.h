// NEON: the nearest centroid by sums of absolute differences, or by the largest of them. Private to
// neon.cc and neon_dot.cc: lanes are the rows of a block, one centroid after the other.
//
// Packed codebooks are the canonical centroids.
#pragma once

#include "neon_common.h"

namespace lutra {
namespace {

size_t apart_bytes(const PqShape& s) {
  return static_cast<size_t>(s.codebooks) * s.centroids * s.dim;
}

void pack_apart(const PqShape& s, const uint8_t* centroids, uint8_t* packed) {
  for (size_t i = 0; i < apart_bytes(s); ++i) packed[i] = centroids[i];
}

[[gnu::noinline]] uint8x16_t search_l1(const PqShape& s, const uint8_t* c, const uint8x16_t* x) {
  uint16x8_t best[2] = {vdupq_n_u16(UINT16_MAX), vdupq_n_u16(UINT16_MAX)};
  uint16x8_t code[2] = {vdupq_n_u16(0), vdupq_n_u16(0)}, index = vdupq_n_u16(0);
  for (int32_t k = 0; k < s.centroids; ++k, c += s.dim) {
    uint16x8_t sum[2] = {vdupq_n_u16(0), vdupq_n_u16(0)};
    for (int32_t v = 0; v < s.dim; ++v) {
      const uint8x16_t value = vld1q_dup_u8(c + v);
      sum[0] = vabal_u8(sum[0], vget_low_u8(x[v]), vget_low_u8(value));
      sum[1] = vabal_high_u8(sum[1], x[v], value);
    }
    for (int32_t h = 0; h < 2; ++h) {
      code[h] = vbslq_u16(vcltq_u16(sum[h], best[h]), index, code[h]);
      best[h] = vminq_u16(best[h], sum[h]);
    }
    index = vaddq_u16(index, vdupq_n_u16(1));
  }
  return vmovn_high_u16(vmovn_u16(code[0]), code[1]);
}

[[gnu::noinline]] uint8x16_t search_chebyshev(const PqShape& s, const uint8_t* c,
                                              const uint8x16_t* x) {
  uint8x16_t best = vdupq_n_u8(UINT8_MAX), code = vdupq_n_u8(0), index = code;
  for (int32_t k = 0; k < s.centroids; ++k, c += s.dim) {
    uint8x16_t most = vdupq_n_u8(0);
    for (int32_t v = 0; v < s.dim; ++v) {
      most = vmaxq_u8(most, vabdq_u8(x[v], vld1q_dup_u8(c + v)));
    }
    code = vbslq_u8(vcltq_u8(most, best), index, code);
    best = vminq_u8(best, most);
    index = vaddq_u8(index, vdupq_n_u8(1));
  }
  return code;
}

// Codes of codebook b for the rows of a block.
LUTRA_INLINE uint8x16_t nearest_apart(const PqShape& s, const uint8_t* packed, int32_t b,
                                      const Rows& rows, const uint8_t* const* entries) {
  const uint8_t* const codebook = packed + static_cast<size_t>(b) * s.centroids * s.dim;
  uint8x16_t x[64];
  with_rows(rows, [&](const auto& loader) {
    for (int32_t v = 0; v < s.dim; ++v) {
      x[v] = b * s.dim + v < s.depth ? loader.load(entries[v]) : vdupq_n_u8(0);
    }
  });
  return s.distance == Distance::kL1 ? search_l1(s, codebook, x) : search_chebyshev(s, codebook, x);
}

}  // namespace
}  // namespace lutra
