// WebAssembly: the dot product of bytes of relaxed SIMD. Private to wasm_dot.cc.
#pragma once

#include "wasm_common.h"

namespace lutra {
namespace {

// a[2i] * b[2i] + a[2i + 1] * b[2i + 1] in 16 bits, a signed, b in 0..127. Engines may differ where
// b is larger; else the sums are below 2^15 and the same everywhere, as activations have 7 bits and
// weights are not -128.
//
// It is i16x8.relaxed_dot_i8x16_i7x16_s, which emscripten's compiler came to know later than other
// instructions of relaxed SIMD. Here stands one of the same operands that nothing else uses;
// wasm_dot.py puts the right number in its place when the module is linked.
LUTRA_INLINE v128_t dot_bytes(v128_t a, v128_t b) {
  return reinterpret_cast<v128_t>(
      __builtin_wasm_relaxed_min_f32x4(reinterpret_cast<__f32x4>(a), reinterpret_cast<__f32x4>(b)));
}

// Bytes of a, b, c and d in turn, of 16 rows: to[q] has rows 4q..4q + 3.
LUTRA_INLINE void zip_quads(v128_t a, v128_t b, v128_t c, v128_t d, v128_t* to) {
  const v128_t ab[2] = {zip_low(a, b), zip_high(a, b)}, cd[2] = {zip_low(c, d), zip_high(c, d)};
#pragma GCC unroll 2
  for (int32_t h = 0; h < 2; ++h) {
    to[2 * h] = wasm_i16x8_shuffle(ab[h], cd[h], 0, 8, 1, 9, 2, 10, 3, 11);
    to[2 * h + 1] = wasm_i16x8_shuffle(ab[h], cd[h], 4, 12, 5, 13, 6, 14, 7, 15);
  }
}

}  // namespace
}  // namespace lutra
