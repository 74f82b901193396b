// The operations that functions.h, planes.h and attention.h are written in, for NEON. Private to
// neon.cc and neon_dot.cc. scalar_lanes.h says what each of them does.
#pragma once

#include "neon_common.h"

namespace lutra {
namespace {

constexpr int32_t kLanes = 4, kVectorRegisters = 32;
using Floats = float32x4_t;
using Ints = int32x4_t;
struct Mask {
  uint32x4_t m;  // all bits of a lane or none
};

LUTRA_INLINE Floats splat(float v) { return vdupq_n_f32(v); }
LUTRA_INLINE Ints splat(int32_t v) { return vdupq_n_s32(v); }
LUTRA_INLINE Floats load_floats(const float* p) { return vld1q_f32(p); }
LUTRA_INLINE Floats load_floats(const float* p, int32_t count) {
  if (count >= kLanes) return vld1q_f32(p);
  float lanes[kLanes] = {};
  for (int32_t i = 0; i < count; ++i) lanes[i] = p[i];
  return vld1q_f32(lanes);
}
LUTRA_INLINE void store_floats(float* p, Floats v) { vst1q_f32(p, v); }
LUTRA_INLINE void store_floats(float* p, Floats v, int32_t count) {
  if (count >= kLanes) return vst1q_f32(p, v);
  float lanes[kLanes];
  vst1q_f32(lanes, v);
  for (int32_t i = 0; i < count; ++i) p[i] = lanes[i];
}

LUTRA_INLINE Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
LUTRA_INLINE Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
LUTRA_INLINE Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
LUTRA_INLINE Floats div(Floats a, Floats b) { return vdivq_f32(a, b); }
LUTRA_INLINE Floats fmadd(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
LUTRA_INLINE Floats fnmadd(Floats a, Floats b, Floats c) { return vfmsq_f32(c, a, b); }
// Not fmin and fmax, which give NaN where either operand is.
LUTRA_INLINE Floats minimum(Floats a, Floats b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
LUTRA_INLINE Floats maximum(Floats a, Floats b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
LUTRA_INLINE Floats root(Floats a) { return vsqrtq_f32(a); }

LUTRA_INLINE Ints bits(Floats a) { return vreinterpretq_s32_f32(a); }
LUTRA_INLINE Floats floats(Ints a) { return vreinterpretq_f32_s32(a); }
LUTRA_INLINE Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
LUTRA_INLINE Ints sub(Ints a, Ints b) { return vsubq_s32(a, b); }
LUTRA_INLINE Ints both(Ints a, Ints b) { return vandq_s32(a, b); }
LUTRA_INLINE Ints either(Ints a, Ints b) { return vorrq_s32(a, b); }
LUTRA_INLINE Ints lesser(Ints a, Ints b) { return vminq_s32(a, b); }
template <int kBits>
LUTRA_INLINE Ints shift_left(Ints a) {
  return vshlq_n_s32(a, kBits);
}
template <int kBits>
LUTRA_INLINE Ints shift_right(Ints a) {
  return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), kBits));
}

LUTRA_INLINE Mask less(Floats a, Floats b) { return {vcltq_f32(a, b)}; }
LUTRA_INLINE Mask at_least(Floats a, Floats b) { return {vcgeq_f32(a, b)}; }
LUTRA_INLINE Mask unordered(Floats a) { return {vmvnq_u32(vceqq_f32(a, a))}; }
LUTRA_INLINE Floats choose(Mask m, Floats a, Floats b) { return vbslq_f32(m.m, a, b); }
LUTRA_INLINE Floats zero_where(Mask m, Floats a) {
  return floats(vbicq_s32(bits(a), vreinterpretq_s32_u32(m.m)));
}
LUTRA_INLINE Ints with_bit(Ints a, Mask m, int32_t bit) {
  return either(a, both(vreinterpretq_s32_u32(m.m), splat(bit)));
}

LUTRA_INLINE Floats power(Ints n) { return floats(shift_left<23>(add(n, splat(127)))); }
LUTRA_INLINE Floats scale_gradual(Floats a, Floats n) {
  const Ints all = vcvtnq_s32_f32(n), half = vshrq_n_s32(all, 1);
  return mul(mul(a, power(half)), power(sub(all, half)));
}
LUTRA_INLINE Floats scale(Floats a, Floats n) { return mul(a, power(vcvtnq_s32_f32(n))); }

LUTRA_INLINE Floats floor_of(Floats a) { return vrndmq_f32(a); }
LUTRA_INLINE Ints floor_ints(Floats t) { return vcvtmq_s32_f32(t); }

// The bytes of 8 entries are two registers, those of 16 are four: what one tbl reads.
template <int kEntries>
struct Table {
  uint8x16_t part[kEntries / 4];
  LUTRA_INLINE explicit Table(const float* v) {
    for (int32_t i = 0; i < kEntries / 4; ++i) {
      part[i] = vreinterpretq_u8_f32(vld1q_f32(v + 4 * i));
    }
  }
};
// Entry i's bytes are 4 i .. 4 i + 3: no byte of the product carries into the next one.
template <int kEntries>
LUTRA_INLINE Floats at(const Table<kEntries>& t, Ints i) {
  const Ints word = vmlaq_s32(splat(0x03020100), both(i, splat(kEntries - 1)), splat(0x04040404));
  const uint8x16_t index = vreinterpretq_u8_s32(word);
  if constexpr (kEntries == 8) {
    return vreinterpretq_f32_u8(vqtbl2q_u8({{t.part[0], t.part[1]}}, index));
  } else {
    const uint8x16_t low = vqtbl4q_u8({{t.part[0], t.part[1], t.part[2], t.part[3]}}, index);
    if constexpr (kEntries == 16) return vreinterpretq_f32_u8(low);
    if constexpr (kEntries == 32) {
      return vreinterpretq_f32_u8(vqtbx4q_u8(low, {{t.part[4], t.part[5], t.part[6], t.part[7]}},
                                             vsubq_u8(index, vdupq_n_u8(64))));
    }
  }
}
// `last`: the highest bit of the index, which is not in i.
template <int kEntries>
LUTRA_INLINE Floats at_last(const Table<kEntries>& t, Ints i, Mask last) {
  return at(t, with_bit(i, last, kEntries / 2));
}

}  // namespace
}  // namespace lutra
