// NEON without dot products: depthwise layers in int8, tap by tap. Private to neon.cc.
//
// Two taps of 16 rows are multiplied into 16 bits, which hold them, and then added to the sums.
// With a step of 2, ld2 takes the bytes of the rows apart from those between. Packed weights are
// the canonical ones; packed masks: [tap][64 rows], a byte of all bits or none.
#pragma once

#include "neon_depthwise.h"

namespace lutra {
namespace {

size_t depthwise8_bytes(const DepthwiseShape& s, int32_t outputs) {
  return static_cast<size_t>(outputs) * s.taps;
}

void pack_depthwise8(const DepthwiseShape& s, int32_t outputs, const int8_t* weights,
                     uint8_t* packed) {
  const size_t count = depthwise8_bytes(s, outputs);
  for (size_t i = 0; i < count; ++i) packed[i] = static_cast<uint8_t>(weights[i]);
}

size_t depthwise8_mask_bytes(const DepthwiseShape& s) {
  return static_cast<size_t>(s.taps) * kRows;
}

void pack_depthwise8_masks(const DepthwiseShape& s, const uint64_t* valid, uint8_t* packed) {
  for (int32_t t = 0; t < s.taps; ++t) {
    for (int32_t r = 0; r < kRows; ++r) *packed++ = valid[t] >> r & 1 ? 255 : 0;
  }
}

template <int kStep, bool kZero>
struct Taps {
  const uint8_t *plane, *masks;
  const int32_t* offset;
  uint8x16_t zero;
  LUTRA_INLINE int8x16_t at(int32_t t, int32_t row) const {
    const uint8_t* const from = plane + offset[t] + row * kStep;
    const uint8x16_t in = vld1q_u8(masks + t * kRows + row);
    const uint8x16_t v = kStep == 1 ? vld1q_u8(from) : vld2q_u8(from).val[0];
    return vreinterpretq_s8_u8(kZero ? vandq_u8(v, in) : vbslq_u8(in, v, zero));
  }
};

template <int kStep, bool kZero>
void depthwise8_outputs(const DepthwiseShape& s, const uint8_t* packed,
                        const DepthwiseTile<uint8_t>& x, int32_t first, int32_t last,
                        const Epilogue& e) {
  const Finish finish(e);
  each_output(s, x, first, last, [&](int32_t m, const uint8_t* plane) {
    const int8_t* const w =
        reinterpret_cast<const int8_t*>(packed) + static_cast<size_t>(m) * s.taps;
    const Taps<kStep, kZero> taps = {plane, x.masks, x.offset, vdupq_n_u8(x.zero)};
    for (int32_t row = 0; row < e.rows; row += kBlock) {
      int32x4_t sum[4];
      sum[0] = sum[1] = sum[2] = sum[3] = vdupq_n_s32(0);
      int32_t t = 0;
      for (; t + 2 <= s.taps; t += 2) {
        const int8x16_t a = taps.at(t, row), b = taps.at(t + 1, row);
        const int8x16_t u = vdupq_n_s8(w[t]), v = vdupq_n_s8(w[t + 1]);
        add_words(
            vmlal_s8(vmull_s8(vget_low_s8(a), vget_low_s8(u)), vget_low_s8(b), vget_low_s8(v)),
            vmlal_high_s8(vmull_high_s8(a, u), b, v), sum);
      }
      if (t < s.taps) {
        const int8x16_t a = taps.at(t, row), u = vdupq_n_s8(w[t]);
        add_words(vmull_s8(vget_low_s8(a), vget_low_s8(u)), vmull_high_s8(a, u), sum);
      }
      finish.sums(m, row, 0, sum);
    }
  });
}

void depthwise8(const DepthwiseShape& s, const uint8_t* packed, const DepthwiseTile<uint8_t>& x,
                int32_t first, int32_t last, const Epilogue& e) {
  auto* const run = s.step == 1
                        ? x.zero ? depthwise8_outputs<1, false> : depthwise8_outputs<1, true>
                    : x.zero ? depthwise8_outputs<2, false>
                             : depthwise8_outputs<2, true>;
  run(s, packed, x, first, last, e);
}

}  // namespace
}  // namespace lutra
