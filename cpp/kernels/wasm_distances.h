// WebAssembly: the nearest centroid by sums of absolute differences, or by the largest of them.
// Private to wasm.cc: lanes are the rows of a block, one centroid after the other.
//
// Packed codebooks are the canonical centroids.
#pragma once

#include "wasm_common.h"

namespace lutra {
namespace {

LUTRA_INLINE size_t apart_bytes(const PqShape& s) {
  return static_cast<size_t>(s.codebooks) * s.centroids * s.dim;
}

// Bytes of at most 127 differ by what fits a signed byte.
LUTRA_INLINE v128_t apart(v128_t x, const uint8_t* c) {
  return wasm_i8x16_abs(wasm_i8x16_sub(x, wasm_v128_load8_splat(c)));
}

[[gnu::noinline]] v128_t search_l1(const PqShape& s, const uint8_t* c, const v128_t* x) {
  v128_t best[2] = {wasm_i16x8_splat(INT16_MAX), wasm_i16x8_splat(INT16_MAX)};
  v128_t code[2] = {zeros(), zeros()}, index = zeros();
  for (int32_t k = 0; k < s.centroids; ++k, c += s.dim) {
    v128_t sum[2] = {zeros(), zeros()};
    for (int32_t v = 0; v < s.dim; ++v) {
      const v128_t far = apart(x[v], c + v);
      sum[0] = wasm_i16x8_add(sum[0], wasm_u16x8_extend_low_u8x16(far));
      sum[1] = wasm_i16x8_add(sum[1], wasm_u16x8_extend_high_u8x16(far));
    }
    for (int32_t h = 0; h < 2; ++h) {
      code[h] = wasm_v128_bitselect(index, code[h], wasm_i16x8_lt(sum[h], best[h]));
      best[h] = wasm_i16x8_min(best[h], sum[h]);
    }
    index = wasm_i16x8_add(index, wasm_i16x8_splat(1));
  }
  return wasm_u8x16_narrow_i16x8(code[0], code[1]);
}

[[gnu::noinline]] v128_t search_chebyshev(const PqShape& s, const uint8_t* c, const v128_t* x) {
  // 127 is the largest distance there is: where no centroid is nearer, the first one is taken.
  v128_t best = wasm_i8x16_splat(127), code = zeros(), index = zeros();
  for (int32_t k = 0; k < s.centroids; ++k, c += s.dim) {
    v128_t most = zeros();
    for (int32_t v = 0; v < s.dim; ++v) most = wasm_i8x16_max(most, apart(x[v], c + v));
    code = wasm_v128_bitselect(index, code, wasm_i8x16_lt(most, best));
    best = wasm_i8x16_min(best, most);
    index = wasm_i8x16_add(index, wasm_i8x16_splat(1));
  }
  return code;
}

// Codes of codebook b for the rows of a block; `entries` of the sub-vector's entries that exist.
LUTRA_INLINE v128_t nearest_apart(const PqShape& s, const uint8_t* packed, int32_t b,
                                  const Rows& rows, const uint8_t* const* entries) {
  const uint8_t* const codebook = packed + static_cast<size_t>(b) * s.centroids * s.dim;
  v128_t x[64];
  with_rows(rows, [&](const auto& loader) {
    for (int32_t v = 0; v < s.dim; ++v) {
      x[v] = b * s.dim + v < s.depth ? loader.load(entries[v]) : zeros();
    }
  });
  return s.distance == Distance::kL1 ? search_l1(s, codebook, x) : search_chebyshev(s, codebook, x);
}

}  // namespace
}  // namespace lutra
