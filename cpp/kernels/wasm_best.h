// WebAssembly: what both searches for the nearest centroid in 16 bits share. Private to the files
// of wasm_kernels.h.
#pragma once

#include "centred.h"
#include "wasm_common.h"

namespace lutra {
namespace {

LUTRA_INLINE uint32_t two_words(int32_t low, int32_t high) {
  return (static_cast<uint32_t>(high) << 16) | (static_cast<uint32_t>(low) & 0xffff);
}

// Entries of 16 rows, in 16 bits.
using Values = v128_t[2];

template <typename Loader>
LUTRA_INLINE void load_values(const Loader& rows, const uint8_t* const* entries, int32_t dim,
                              Values* x) {
  for (int32_t v = 0; v < dim; ++v) {
    const v128_t bytes = rows.load(entries[v]);
    x[v][0] = wasm_u16x8_extend_low_u8x16(bytes);
    x[v][1] = wasm_u16x8_extend_high_u8x16(bytes);
  }
}

// The best scores of 16 rows so far, and their codes in bytes.
struct Best {
  v128_t score[2] = {wasm_i16x8_splat(INT16_MIN), wasm_i16x8_splat(INT16_MIN)};
  v128_t code = zeros(), first = zeros();

  // Four centroids; on ties the earlier one stays.
  LUTRA_INLINE void add(const v128_t (*s)[2]) {
    v128_t m01[2], m23[2], m[2], better[2];
#pragma GCC unroll 2
    for (int32_t h = 0; h < 2; ++h) {
      m01[h] = wasm_i16x8_gt(s[1][h], s[0][h]);
      m23[h] = wasm_i16x8_gt(s[3][h], s[2][h]);
      const v128_t s01 = wasm_i16x8_max(s[0][h], s[1][h]);
      const v128_t s23 = wasm_i16x8_max(s[2][h], s[3][h]);
      m[h] = wasm_i16x8_gt(s23, s01);
      const v128_t most = wasm_i16x8_max(s01, s23);
      better[h] = wasm_i16x8_gt(most, score[h]);
      score[h] = wasm_i16x8_max(score[h], most);
    }
    const auto bytes = [](const v128_t* mask) { return wasm_i8x16_narrow_i16x8(mask[0], mask[1]); };
    const v128_t c01 = wasm_i8x16_sub(first, bytes(m01));
    const v128_t c23 = wasm_i8x16_sub(wasm_i8x16_add(first, wasm_i8x16_const_splat(2)), bytes(m23));
    const v128_t c = wasm_v128_bitselect(c23, c01, bytes(m));
    code = wasm_v128_bitselect(c, code, bytes(better));
    first = wasm_i8x16_add(first, wasm_i8x16_const_splat(4));
  }
};

}  // namespace
}  // namespace lutra
