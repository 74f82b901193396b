// The operations that functions.h is written in, on one lane: what they mean. avx2_lanes.h,
// avx512_lanes.h, neon_lanes.h and wasm_lanes.h give the same bits in every lane. Private to
// scalar.cc.
#pragma once

#include <cmath>

#include "kernels.h"

namespace lutra {
namespace {

constexpr int32_t kLanes = 1, kVectorRegisters = 16;
using Floats = float;
using Ints = int32_t;
using Mask = bool;

Floats splat(float v) { return v; }
Ints splat(int32_t v) { return v; }
// All lanes, or the first `count`; the others are 0 and are not written.
Floats load_floats(const float* p) { return *p; }
Floats load_floats(const float* p, int32_t count) { return count > 0 ? *p : 0.0f; }
void store_floats(float* p, Floats v) { *p = v; }
void store_floats(float* p, Floats v, int32_t count) {
  if (count > 0) *p = v;
}

Floats add(Floats a, Floats b) { return a + b; }
Floats sub(Floats a, Floats b) { return a - b; }
Floats mul(Floats a, Floats b) { return a * b; }
Floats div(Floats a, Floats b) { return a / b; }
Floats fmadd(Floats a, Floats b, Floats c) { return std::fmaf(a, b, c); }
Floats fnmadd(Floats a, Floats b, Floats c) { return std::fmaf(-a, b, c); }
// b where one is NaN, or both are zeros
#ifdef __wasm__  // where Clang 14 makes f32.max of `0 > x ? 0 : x`, which is 0 for -0
Floats chosen(bool first, Floats a, Floats b) {
  __asm__("" : "+r"(first));
  return first ? a : b;
}
Floats minimum(Floats a, Floats b) { return chosen(a < b, a, b); }
Floats maximum(Floats a, Floats b) { return chosen(a > b, a, b); }
#else
Floats minimum(Floats a, Floats b) { return a < b ? a : b; }
Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
#endif
Floats root(Floats a) { return std::sqrt(a); }

Ints bits(Floats a) { return __builtin_bit_cast(int32_t, a); }
Floats floats(Ints a) { return __builtin_bit_cast(float, a); }
Ints add(Ints a, Ints b) {  // modulo 2^32
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}
Ints sub(Ints a, Ints b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b));
}
Ints both(Ints a, Ints b) { return a & b; }
Ints either(Ints a, Ints b) { return a | b; }
Ints lesser(Ints a, Ints b) { return a < b ? a : b; }
template <int kBits>
Ints shift_left(Ints a) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) << kBits);
}
template <int kBits>
Ints shift_right(Ints a) {  // zeros come in
  return static_cast<int32_t>(static_cast<uint32_t>(a) >> kBits);
}

Mask less(Floats a, Floats b) { return a < b; }
Mask at_least(Floats a, Floats b) { return a >= b; }
Mask unordered(Floats a) { return std::isnan(a); }
Floats choose(Mask m, Floats a, Floats b) { return m ? a : b; }
Floats zero_where(Mask m, Floats a) { return m ? 0.0f : a; }
// with_bit(a, m, bit): a | bit where m, else a. Only piecewise.h needs it.

// To an integer, for numbers and not for NaN, whose result does not matter.
Ints integer(Floats t) { return std::isnan(t) ? 0 : static_cast<int32_t>(t); }

// a 2^n for an integer n of -126..127, rounded once.
Floats scale(Floats a, Floats n) { return a * floats(shift_left<23>(integer(n) + 127)); }

// The same for n of -252..254: what is too large becomes infinite, what is too small loses bits.
Floats scale_gradual(Floats a, Floats n) {
  const int32_t all = integer(n), half = all >> 1;
  return a * floats(shift_left<23>(half + 127)) * floats(shift_left<23>(all - half + 127));
}

Floats floor_of(Floats a) { return std::floor(a); }
Ints floor_ints(Floats t) { return integer(std::floor(t)); }

// 8, 16 or 32 entries, read at an index modulo their number.
template <int kEntries>
struct Table {
  const float* entries;
  explicit Table(const float* v) : entries(v) {}
};
template <int kEntries>
Floats at(const Table<kEntries>& t, Ints i) {
  return t.entries[i & (kEntries - 1)];
}
// at_last(t, i, m): at(t, i), the highest bit of the index being m. Only piecewise.h needs it.

}  // namespace
}  // namespace lutra
