// a b + c, rounded once, in vectors: WebAssembly has no such instruction whose bits are the same on
// every machine. Private to wasm_kernels.h.
//
// In float64 the product of two floats is exact, and the sum s = a b + c is rounded to 53 bits.
// Rounding s to a float gives the same as rounding the exact sum, unless s is halfway between two
// floats and only so by its own rounding, or is too small for a float of 24 bits. Both are seen in
// the bits of s, and are so rare that they may take a slow way. What is infinite, NaN or too large
// is right by itself.
#pragma once

#include <wasm_simd128.h>

#include "kernels.h"

#define LUTRA_INLINE [[gnu::always_inline]] inline
#define LUTRA_COLD [[clang::minsize]]  // runs once for each layer

namespace lutra {
namespace {

constexpr int32_t kHalfway = 1 << 28;  // of the 29 bits that a float has not
constexpr int32_t kBelowFloat = (1 << 29) - 1;

LUTRA_INLINE v128_t upper_half(v128_t v) { return wasm_i64x2_shuffle(v, v, 1, 1); }
LUTRA_INLINE v128_t promote_low(v128_t v) { return wasm_f64x2_promote_low_f32x4(v); }
LUTRA_INLINE v128_t promote_high(v128_t v) { return promote_low(upper_half(v)); }
LUTRA_INLINE v128_t demote(v128_t low, v128_t high) {
  return wasm_i64x2_shuffle(wasm_f32x4_demote_f64x2_zero(low), wasm_f32x4_demote_f64x2_zero(high),
                            0, 2);
}

// Lanes of 32 bits that are not zero where rounding two pairs of doubles to floats may be wrong.
// `rounded` is what they became.
LUTRA_INLINE v128_t doubtful(v128_t low, v128_t high, v128_t rounded) {
  const v128_t last = wasm_i32x4_shuffle(low, high, 0, 2, 4, 6);
  const v128_t halfway =
      wasm_i32x4_eq(wasm_v128_and(last, wasm_i32x4_splat(kBelowFloat)), wasm_i32x4_splat(kHalfway));
  // Zero, which is exact, has no bits in the doubles either.
  const v128_t first = wasm_i32x4_shuffle(low, high, 1, 3, 5, 7);
  const v128_t something = wasm_v128_or(wasm_i32x4_shl(first, 1), last);
  const v128_t small = wasm_i32x4_lt(wasm_v128_and(rounded, wasm_i32x4_splat(0x7fffffff)),
                                     wasm_i32x4_splat(0x00800001));
  return wasm_v128_or(halfway, wasm_v128_and(small, something));
}

// The same for a pair of doubles, where no factor of the chain is tiny, see below: a sum that is
// too small for a float of 24 bits is then exact.
LUTRA_INLINE v128_t doubtful_halves(v128_t s) {
  return wasm_i64x2_eq(wasm_v128_and(s, wasm_i64x2_splat(kBelowFloat)), wasm_i64x2_splat(kHalfway));
}

// Floats below 2^-60, but for 0, are tiny. The product of two others is a multiple of 2^-166, as is
// every float, so that a double holds all bits of a sum below 2^-113.
constexpr int32_t kTinyBits = (127 - 60) << 23;

// The exact sum, as a double whose rounding to a float is right: what is inexact gets an odd last
// bit (Boldo, Melquiond 2008), as in wasm_fmaf.cc.
LUTRA_INLINE v128_t odd_sum(v128_t product, v128_t c) {
  const v128_t sum = wasm_f64x2_add(product, c), part = wasm_f64x2_sub(sum, product);
  const v128_t error =
      wasm_f64x2_add(wasm_f64x2_sub(product, wasm_f64x2_sub(sum, part)), wasm_f64x2_sub(c, part));
  const v128_t zero = wasm_f64x2_splat(0.0), one = wasm_i64x2_splat(1);
  // Both are false for the NaN that an infinite sum has for an error.
  const v128_t inexact = wasm_v128_or(wasm_f64x2_gt(error, zero), wasm_f64x2_lt(error, zero));
  const v128_t even = wasm_i64x2_ne(wasm_v128_and(sum, one), one);
  // 1 away from zero where the error has the sign of the sum, else -1
  const v128_t step = wasm_v128_or(wasm_i64x2_shr(wasm_v128_xor(error, sum), 63), one);
  return wasm_i64x2_add(sum, wasm_v128_and(step, wasm_v128_and(inexact, even)));
}

[[gnu::noinline]] v128_t fused_slowly(v128_t a, v128_t b, v128_t c) {
  return demote(odd_sum(wasm_f64x2_mul(promote_low(a), promote_low(b)), promote_low(c)),
                odd_sum(wasm_f64x2_mul(promote_high(a), promote_high(b)), promote_high(c)));
}

LUTRA_INLINE v128_t fused(v128_t a, v128_t b, v128_t c) {
  const v128_t low = wasm_f64x2_add(wasm_f64x2_mul(promote_low(a), promote_low(b)), promote_low(c));
  const v128_t high =
      wasm_f64x2_add(wasm_f64x2_mul(promote_high(a), promote_high(b)), promote_high(c));
  const v128_t rounded = demote(low, high);
  if (wasm_v128_any_true(doubtful(low, high, rounded))) [[unlikely]] {
    return fused_slowly(a, b, c);
  }
  return rounded;
}

}  // namespace
}  // namespace lutra
