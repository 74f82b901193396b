// WebAssembly: the search for the nearest centroid in 16 bits. Private to wasm.cc.
#pragma once

#include "wasm_best.h"

namespace lutra {
namespace {

// Packed, of four centroids: c'_v twice for each entry v and each of them, in 16 bits.
LUTRA_COLD uint32_t* pack_narrow(const Centred& codebook, int32_t k, int32_t dim, uint32_t* to) {
  for (int32_t v = 0; v < dim; ++v) {
    for (int32_t j = k; j < k + 4; ++j) *to++ = two_words(codebook.c[j][v], codebook.c[j][v]);
  }
  return to;
}

template <typename Loader>
LUTRA_INLINE void load_narrow(const Loader& rows, const uint8_t* const* entries, int32_t dim,
                              Values* x) {
  load_values(rows, entries, dim, x);
}

// Four centroids at a time: eight sums in registers; a load of x serves four multiply-adds.
[[gnu::noinline]] v128_t search16(const uint32_t* codebook, int32_t dim, int32_t centroids,
                                  const Values* x) {
  Best best;
  for (int32_t k = 0; k < centroids; k += 4) {
    v128_t s[4][2];
#pragma GCC unroll 4
    for (int32_t j = 0; j < 4; ++j) s[j][0] = s[j][1] = wasm_v128_load32_splat(codebook + j);
    codebook += 4;
    for (int32_t v = 0; v < dim; ++v, codebook += 4) {
#pragma GCC unroll 4
      for (int32_t j = 0; j < 4; ++j) {
        const v128_t c = wasm_v128_load32_splat(codebook + j);
        s[j][0] = wasm_i16x8_add(s[j][0], wasm_i16x8_mul(x[v][0], c));
        s[j][1] = wasm_i16x8_add(s[j][1], wasm_i16x8_mul(x[v][1], c));
      }
    }
    best.add(s);
  }
  return best.code;
}

}  // namespace
}  // namespace lutra
