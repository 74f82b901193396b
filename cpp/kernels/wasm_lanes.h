// The operations that functions.h, planes.h and attention.h are written in, for WebAssembly.
// Private to wasm_kernels.h. scalar_lanes.h says what each of them does.
#pragma once

#include "wasm_common.h"

namespace lutra {
namespace {

constexpr int32_t kLanes = 4, kVectorRegisters = 16;
// v128_t has no type of its lanes, so that each kind gets one.
struct Floats {
  v128_t v;
};
struct Ints {
  v128_t v;
};
struct Mask {
  v128_t m;  // all bits of a lane or none
};

LUTRA_INLINE Floats splat(float v) { return {wasm_f32x4_splat(v)}; }
LUTRA_INLINE Ints splat(int32_t v) { return {wasm_i32x4_splat(v)}; }
LUTRA_INLINE Floats load_floats(const float* p) { return {load(p)}; }
LUTRA_INLINE Floats load_floats(const float* p, int32_t count) {
  if (count >= kLanes) return {load(p)};
  alignas(16) float lanes[kLanes] = {};
  for (int32_t i = 0; i < count; ++i) lanes[i] = p[i];
  return {load(lanes)};
}
LUTRA_INLINE void store_floats(float* p, Floats a) { store(p, a.v); }
LUTRA_INLINE void store_floats(float* p, Floats a, int32_t count) {
  if (count >= kLanes) return store(p, a.v);
  alignas(16) float lanes[kLanes];
  store(lanes, a.v);
  for (int32_t i = 0; i < count; ++i) p[i] = lanes[i];
}

LUTRA_INLINE Floats add(Floats a, Floats b) { return {wasm_f32x4_add(a.v, b.v)}; }
LUTRA_INLINE Floats sub(Floats a, Floats b) { return {wasm_f32x4_sub(a.v, b.v)}; }
LUTRA_INLINE Floats mul(Floats a, Floats b) { return {wasm_f32x4_mul(a.v, b.v)}; }
LUTRA_INLINE Floats div(Floats a, Floats b) { return {wasm_f32x4_div(a.v, b.v)}; }
// Of two dozen instructions: inline it would make the module much larger.
[[gnu::noinline]] v128_t fused_call(v128_t a, v128_t b, v128_t c) { return fused(a, b, c); }
LUTRA_INLINE Floats fmadd(Floats a, Floats b, Floats c) { return {fused_call(a.v, b.v, c.v)}; }
LUTRA_INLINE Floats fnmadd(Floats a, Floats b, Floats c) {
  return {fused_call(wasm_f32x4_neg(a.v), b.v, c.v)};
}
LUTRA_INLINE Floats minimum(Floats a, Floats b) { return {wasm_f32x4_pmin(b.v, a.v)}; }
LUTRA_INLINE Floats maximum(Floats a, Floats b) { return {wasm_f32x4_pmax(b.v, a.v)}; }
LUTRA_INLINE Floats root(Floats a) { return {wasm_f32x4_sqrt(a.v)}; }

LUTRA_INLINE Ints bits(Floats a) { return {a.v}; }
LUTRA_INLINE Floats floats(Ints a) { return {a.v}; }
LUTRA_INLINE Ints add(Ints a, Ints b) { return {wasm_i32x4_add(a.v, b.v)}; }
LUTRA_INLINE Ints sub(Ints a, Ints b) { return {wasm_i32x4_sub(a.v, b.v)}; }
LUTRA_INLINE Ints both(Ints a, Ints b) { return {wasm_v128_and(a.v, b.v)}; }
LUTRA_INLINE Ints either(Ints a, Ints b) { return {wasm_v128_or(a.v, b.v)}; }
LUTRA_INLINE Ints lesser(Ints a, Ints b) { return {wasm_i32x4_min(a.v, b.v)}; }
template <int kBits>
LUTRA_INLINE Ints shift_left(Ints a) {
  return {wasm_i32x4_shl(a.v, kBits)};
}
template <int kBits>
LUTRA_INLINE Ints shift_right(Ints a) {
  return {wasm_u32x4_shr(a.v, kBits)};
}

LUTRA_INLINE Mask less(Floats a, Floats b) { return {wasm_f32x4_lt(a.v, b.v)}; }
LUTRA_INLINE Mask at_least(Floats a, Floats b) { return {wasm_f32x4_ge(a.v, b.v)}; }
LUTRA_INLINE Mask unordered(Floats a) { return {wasm_f32x4_ne(a.v, a.v)}; }
LUTRA_INLINE Floats choose(Mask m, Floats a, Floats b) {
  return {wasm_v128_bitselect(a.v, b.v, m.m)};
}
LUTRA_INLINE Floats zero_where(Mask m, Floats a) { return {wasm_v128_andnot(a.v, m.m)}; }

LUTRA_INLINE Ints integers(Floats n) { return {wasm_i32x4_trunc_sat_f32x4(n.v)}; }  // of integers
LUTRA_INLINE Floats power(Ints n) { return floats(shift_left<23>(add(n, splat(127)))); }
LUTRA_INLINE Floats scale_gradual(Floats a, Floats n) {
  const Ints all = integers(n), half = {wasm_i32x4_shr(all.v, 1)};
  return mul(mul(a, power(half)), power(sub(all, half)));
}
LUTRA_INLINE Floats scale(Floats a, Floats n) { return mul(a, power(integers(n))); }

LUTRA_INLINE Floats floor_of(Floats a) { return {wasm_f32x4_floor(a.v)}; }
LUTRA_INLINE Ints floor_ints(Floats t) { return integers(floor_of(t)); }

// Entries stay where they are; entry i's bytes are 4 i .. 4 i + 3, of which a swizzle gives zeros
// from 16 on. A loop in a function of its own: the module is smaller.
template <int kEntries>
struct Table {
  const float* entries;
  LUTRA_INLINE explicit Table(const float* v) : entries(v) {}
};
[[gnu::noinline]] v128_t entries_of(const float* entries, int32_t count, v128_t i) {
  const v128_t spread =
      wasm_i32x4_mul(wasm_v128_and(i, wasm_i32x4_splat(count - 1)), wasm_i32x4_splat(0x04040404));
  v128_t index = wasm_i32x4_add(spread, wasm_i32x4_splat(0x03020100)), found = zeros();
  for (int32_t e = 0; e < count; e += 4) {
    found = wasm_v128_or(found, wasm_i8x16_swizzle(load(entries + e), index));
    index = wasm_i8x16_sub(index, wasm_i8x16_splat(16));
  }
  return found;
}
template <int kEntries>
LUTRA_INLINE Floats at(const Table<kEntries>& t, Ints i) {
  return {entries_of(t.entries, kEntries, i.v)};
}

}  // namespace
}  // namespace lutra
