// a b + c, rounded once, in vectors: WebAssembly has no such instruction whose bits are the same on
// every machine. Private to wasm.cc.
//
// In float64 the product of two floats is exact, and the sum s = a b + c is rounded to 53 bits.
// Rounding s to a float gives the same as rounding the exact sum, unless s is halfway between two
// floats and only so by its own rounding, or is too small for a float of 24 bits. Both are seen in
// the bits of s, and are so rare that they may take a slow way. What is infinite, NaN or too large
// is right by itself.
#pragma once

#include <wasm_simd128.h>

#include <cmath>

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

[[gnu::noinline, gnu::cold]] v128_t fused_slowly(v128_t a, v128_t b, v128_t c) {
  alignas(16) float x[4], y[4], z[4];
  wasm_v128_store(x, a);
  wasm_v128_store(y, b);
  wasm_v128_store(z, c);
  for (int32_t i = 0; i < 4; ++i) z[i] = std::fmaf(x[i], y[i], z[i]);
  return wasm_v128_load(z);
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

// t = fma(y, scale, bias) of 16 values.
LUTRA_INLINE void multiply_add(const v128_t* y, float scale, float bias, v128_t* t) {
  const v128_t a = wasm_f64x2_splat(static_cast<double>(scale));
  const v128_t b = wasm_f64x2_splat(static_cast<double>(bias));
  v128_t doubt = wasm_i32x4_const(0, 0, 0, 0);
#pragma GCC unroll 4
  for (int32_t i = 0; i < 4; ++i) {
    const v128_t low = wasm_f64x2_add(wasm_f64x2_mul(promote_low(y[i]), a), b);
    const v128_t high = wasm_f64x2_add(wasm_f64x2_mul(promote_high(y[i]), a), b);
    t[i] = demote(low, high);
    doubt = wasm_v128_or(doubt, doubtful(low, high, t[i]));
  }
  if (!wasm_v128_any_true(doubt)) return;
  for (int32_t i = 0; i < 4; ++i) {
    t[i] = fused_slowly(y[i], wasm_f32x4_splat(scale), wasm_f32x4_splat(bias));
  }
}

}  // namespace
}  // namespace lutra
