// The operations that functions.h, planes.h and attention.h are written in, for AVX-512. Private to
// avx512.cc. scalar_lanes.h says what each of them does.
#pragma once

#include "avx512_common.h"

namespace lutra {
namespace {

constexpr int32_t kLanes = 16, kVectorRegisters = 32;
using Floats = __m512;
using Ints = __m512i;
using Mask = __mmask16;

Floats splat(float v) { return _mm512_set1_ps(v); }
Ints splat(int32_t v) { return _mm512_set1_epi32(v); }
Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
Floats load_floats(const float* p, int32_t count) {
  return _mm512_maskz_loadu_ps(lane_mask(count), p);
}
void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
void store_floats(float* p, Floats v, int32_t count) {
  _mm512_mask_storeu_ps(p, lane_mask(count), v);
}

Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
Floats fnmadd(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
Floats root(Floats a) { return _mm512_sqrt_ps(a); }

Ints bits(Floats a) { return _mm512_castps_si512(a); }
Floats floats(Ints a) { return _mm512_castsi512_ps(a); }
Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
Ints lesser(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
template <int kBits>
Ints shift_left(Ints a) {
  return _mm512_slli_epi32(a, kBits);
}
template <int kBits>
Ints shift_right(Ints a) {
  return _mm512_srli_epi32(a, kBits);
}

Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
Mask at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
Mask unordered(Floats a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
Floats choose(Mask m, Floats a, Floats b) { return _mm512_mask_blend_ps(m, b, a); }
Floats zero_where(Mask m, Floats a) { return _mm512_maskz_mov_ps(static_cast<Mask>(~m), a); }
Ints with_bit(Ints a, Mask m, int32_t bit) {
  return _mm512_mask_or_epi32(a, m, a, _mm512_set1_epi32(bit));
}

// vscalefps rounds once too, and needs no care with small and large exponents.
Floats scale_gradual(Floats a, Floats n) { return _mm512_scalef_ps(a, n); }
Floats scale(Floats a, Floats n) { return _mm512_scalef_ps(a, n); }

Floats floor_of(Floats a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
Ints floor_ints(Floats t) {
  return _mm512_cvt_roundps_epi32(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

// 8 entries are there twice, so that the fourth bit of an index does not matter.
template <int kEntries>
struct Table {
  Floats low, high;
  explicit Table(const float* v)
      : low(kEntries == 8 ? _mm512_broadcast_f32x8(_mm256_loadu_ps(v)) : _mm512_loadu_ps(v)),
        high(kEntries == 32 ? _mm512_loadu_ps(v + 16) : low) {}
};
template <int kEntries>
Floats at(const Table<kEntries>& t, Ints i) {
  return kEntries == 32 ? _mm512_permutex2var_ps(t.low, i, t.high)
                        : _mm512_permutexvar_ps(i, t.low);
}
template <int kEntries>
Floats at_last(const Table<kEntries>& t, Ints i, Mask last) {
  return at(t, with_bit(i, last, kEntries / 2));
}

}  // namespace
}  // namespace lutra
