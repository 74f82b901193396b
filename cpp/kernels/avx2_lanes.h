// The operations that functions.h, planes.h and attention.h are written in, for AVX2. Private to
// avx2.cc. scalar_lanes.h says what each of them does.
#pragma once

#include "avx2_common.h"

namespace lutra {
namespace {

constexpr int32_t kLanes = 8, kVectorRegisters = 16;
using Floats = __m256;
using Ints = __m256i;
struct Mask {
  __m256 m;  // all bits of a lane or none
};

LUTRA_INLINE Floats splat(float v) { return _mm256_set1_ps(v); }
LUTRA_INLINE Ints splat(int32_t v) { return _mm256_set1_epi32(v); }
LUTRA_INLINE Ints first_lanes(int32_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LUTRA_INLINE Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
LUTRA_INLINE Floats load_floats(const float* p, int32_t count) {
  return _mm256_maskload_ps(p, first_lanes(count));
}
LUTRA_INLINE void store_floats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
LUTRA_INLINE void store_floats(float* p, Floats v, int32_t count) {
  _mm256_maskstore_ps(p, first_lanes(count), v);
}

LUTRA_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
LUTRA_INLINE Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
LUTRA_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
LUTRA_INLINE Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
LUTRA_INLINE Floats fmadd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
LUTRA_INLINE Floats fnmadd(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
LUTRA_INLINE Floats minimum(Floats a, Floats b) { return _mm256_min_ps(a, b); }
LUTRA_INLINE Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
LUTRA_INLINE Floats root(Floats a) { return _mm256_sqrt_ps(a); }

LUTRA_INLINE Ints bits(Floats a) { return _mm256_castps_si256(a); }
LUTRA_INLINE Floats floats(Ints a) { return _mm256_castsi256_ps(a); }
LUTRA_INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
LUTRA_INLINE Ints sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
LUTRA_INLINE Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
LUTRA_INLINE Ints either(Ints a, Ints b) { return _mm256_or_si256(a, b); }
LUTRA_INLINE Ints lesser(Ints a, Ints b) { return _mm256_min_epi32(a, b); }
template <int kBits>
LUTRA_INLINE Ints shift_left(Ints a) {
  return _mm256_slli_epi32(a, kBits);
}
template <int kBits>
LUTRA_INLINE Ints shift_right(Ints a) {
  return _mm256_srli_epi32(a, kBits);
}

LUTRA_INLINE Mask less(Floats a, Floats b) { return {_mm256_cmp_ps(a, b, _CMP_LT_OQ)}; }
LUTRA_INLINE Mask at_least(Floats a, Floats b) { return {_mm256_cmp_ps(a, b, _CMP_GE_OQ)}; }
LUTRA_INLINE Mask unordered(Floats a) { return {_mm256_cmp_ps(a, a, _CMP_UNORD_Q)}; }
LUTRA_INLINE Floats choose(Mask m, Floats a, Floats b) { return _mm256_blendv_ps(b, a, m.m); }
LUTRA_INLINE Floats zero_where(Mask m, Floats a) { return _mm256_andnot_ps(m.m, a); }
LUTRA_INLINE Ints with_bit(Ints a, Mask m, int32_t bit) {
  return either(a, both(bits(m.m), splat(bit)));
}

LUTRA_INLINE Floats power(Ints n) { return floats(shift_left<23>(add(n, splat(127)))); }
LUTRA_INLINE Floats scale_gradual(Floats a, Floats n) {
  const Ints all = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(all, 1);
  return mul(mul(a, power(half)), power(sub(all, half)));
}
LUTRA_INLINE Floats scale(Floats a, Floats n) { return mul(a, power(_mm256_cvtps_epi32(n))); }

LUTRA_INLINE Floats floor_of(Floats a) { return _mm256_floor_ps(a); }
LUTRA_INLINE Ints floor_ints(Floats t) { return _mm256_cvtps_epi32(_mm256_floor_ps(t)); }

// A register for every 8 entries; bits 3 and 4 of an index choose between them.
template <int kEntries>
struct Table {
  Floats part[kEntries / 8];
  LUTRA_INLINE explicit Table(const float* v) {
    LUTRA_UNROLL for (int32_t i = 0; i < kEntries / 8; ++i) part[i] = _mm256_loadu_ps(v + 8 * i);
  }
};
LUTRA_INLINE Floats either_half(Floats low, Floats high, Ints i, Mask second) {
  return choose(second, _mm256_permutevar8x32_ps(high, i), _mm256_permutevar8x32_ps(low, i));
}
// The sign is the mask, which is all that choose() looks at.
template <int kBit>
LUTRA_INLINE Mask has_bit(Ints i) {
  return {floats(shift_left<31 - kBit>(i))};
}
// `last`: the highest bit of the index, which is not in i.
template <int kEntries>
LUTRA_INLINE Floats at_last(const Table<kEntries>& t, Ints i, Mask last) {
  if constexpr (kEntries == 8) {
    return _mm256_permutevar8x32_ps(t.part[0], with_bit(i, last, 4));
  } else if constexpr (kEntries == 16) {
    return either_half(t.part[0], t.part[1], i, last);
  } else {
    const Mask fourth = has_bit<3>(i);
    return choose(last, either_half(t.part[2], t.part[3], i, fourth),
                  either_half(t.part[0], t.part[1], i, fourth));
  }
}
template <int kEntries>
LUTRA_INLINE Floats at(const Table<kEntries>& t, Ints i) {
  if constexpr (kEntries == 8) return _mm256_permutevar8x32_ps(t.part[0], i);
  if constexpr (kEntries == 16) return at_last(t, i, has_bit<3>(i));
  if constexpr (kEntries == 32) return at_last(t, i, has_bit<4>(i));
}

}  // namespace
}  // namespace lutra
