// WebAssembly with relaxed SIMD: the search for the nearest centroid in 16 bits. Private to
// wasm_dot.cc.
#pragma once

#include "wasm_best.h"
#include "wasm_dot.h"

namespace lutra {
namespace {

// A dot product of bytes serves two entries of eight rows.
//
// Packed, of four centroids: (c'_2i, c'_2i+1) twice for each pair of entries i and each of them, in
// bytes.
LUTRA_COLD uint32_t* pack_narrow(const Centred& codebook, int32_t k, int32_t dim, uint32_t* to) {
  for (int32_t v = 0; v < dim; v += 2) {
    for (int32_t j = k; j < k + 4; ++j) {
      const int32_t next = v + 1 < dim ? codebook.c[j][v + 1] : 0;
      const int32_t pair = static_cast<int32_t>(static_cast<uint32_t>(next) << 8 |
                                                (static_cast<uint32_t>(codebook.c[j][v]) & 255));
      *to++ = two_words(pair, pair);
    }
  }
  return to;
}

// x[i] holds entries 2i and 2i + 1 in turn, of rows 0..7 and 8..15.
template <typename Loader>
LUTRA_INLINE void load_narrow(const Loader& rows, const uint8_t* const* entries, int32_t dim,
                              Values* x) {
  for (int32_t v = 0; v < dim; v += 2) {
    const v128_t a = rows.load(entries[v]), b = v + 1 < dim ? rows.load(entries[v + 1]) : zeros();
    x[v / 2][0] = zip_low(a, b);
    x[v / 2][1] = zip_high(a, b);
  }
}

// Four centroids at a time: eight sums in registers; a load of x serves four dot products.
[[gnu::noinline]] v128_t search16(const uint32_t* codebook, int32_t dim, int32_t centroids,
                                  const Values* x) {
  Best best;
  for (int32_t k = 0; k < centroids; k += 4) {
    v128_t s[4][2];
#pragma GCC unroll 4
    for (int32_t j = 0; j < 4; ++j) s[j][0] = s[j][1] = wasm_v128_load32_splat(codebook + j);
    codebook += 4;
    for (int32_t i = 0; i < (dim + 1) / 2; ++i, codebook += 4) {
#pragma GCC unroll 4
      for (int32_t j = 0; j < 4; ++j) {
        const v128_t c = wasm_v128_load32_splat(codebook + j);
        s[j][0] = wasm_i16x8_add(s[j][0], dot_bytes(c, x[i][0]));
        s[j][1] = wasm_i16x8_add(s[j][1], dot_bytes(c, x[i][1]));
      }
    }
    best.add(s);
  }
  return best.code;
}

}  // namespace
}  // namespace lutra
