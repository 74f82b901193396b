// NEON: depthwise layers in float32, and in int8 without dot products. Private to neon.cc and
// neon_dot.cc.
#pragma once

#include "neon_common.h"

namespace lutra {
namespace {

// f(output, its plane, its weights' place) for outputs first..last-1.
template <class T, class F>
LUTRA_INLINE void each_output(const DepthwiseShape& s, const DepthwiseTile<T>& x, int32_t first,
                              int32_t last, const F& f) {
  const T* plane = x.planes + first / s.multiplier * x.plane;
  int32_t left = s.multiplier - first % s.multiplier;  // outputs of this plane
  for (int32_t m = first; m < last; ++m) {
    f(m, plane);
    if (--left == 0) {
      left = s.multiplier;
      plane += x.plane;
    }
  }
}

// --- float32 -------------------------------------------------------------------------------------

// Values of 4 rows, 0 where their bits are.
LUTRA_INLINE float32x4_t masked(float32x4_t v, uint64_t valid) {
  constexpr uint32_t kBits[4] = {1, 2, 4, 8};
  const uint32x4_t in = vtstq_u32(vdupq_n_u32(static_cast<uint32_t>(valid)), vld1q_u32(kBits));
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), in));
}

template <bool kWhole>
LUTRA_INLINE void depthwise_rows(int32_t taps, const float* w, const float* plane,
                                 const int32_t* offset, const uint64_t* valid, int32_t row,
                                 float32x4_t* sum) {
  for (int32_t i = 0; i < 4; ++i) sum[i] = vdupq_n_f32(0.0f);
  for (int32_t t = 0; t < taps; ++t) {
    const float* const from = plane + offset[t] + row;
    for (int32_t i = 0; i < 4; ++i) {
      float32x4_t v = vld1q_f32(from + 4 * i);
      if (!kWhole) v = masked(v, valid[t] >> (row + 4 * i));
      sum[i] = vfmaq_n_f32(sum[i], v, w[t]);
    }
  }
}

// 16 rows at a time. Only tiles that touch the border of the image take masks.
void depthwise(const DepthwiseShape& s, const float* weights, const DepthwiseTile<float>& x,
               int32_t first, int32_t last, const Epilogue& e) {
  const Finish finish(e);
  const uint64_t* const valid = reinterpret_cast<const uint64_t*>(x.masks);
  uint64_t inside = ~uint64_t{0};  // rows all of whose taps are
  for (int32_t t = 0; t < s.taps; ++t) inside &= valid[t];
  each_output(s, x, first, last, [&](int32_t m, const float* plane) {
    const float* const w = weights + static_cast<size_t>(m) * s.taps;
    for (int32_t row = 0; row < e.rows; row += kBlock) {
      float32x4_t sum[4];
      if ((inside >> row & 0xffff) == 0xffff) {
        depthwise_rows<true>(s.taps, w, plane, x.offset, valid, row, sum);
      } else {
        depthwise_rows<false>(s.taps, w, plane, x.offset, valid, row, sum);
      }
      finish.sums(m, row, sum);
    }
  });
}

}  // namespace
}  // namespace lutra
