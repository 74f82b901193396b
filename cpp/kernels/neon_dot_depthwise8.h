// NEON with dot products: depthwise layers in int8. Private to neon_dot.cc.
//
// See depthwise.h: a row of a 3x3 kernel is one sdot for 4 outputs, and no byte is moved between
// lanes. 16 rows at a time, in four registers; two rounds of zip put their sums in order.
// Packed masks: [block of 16 rows][quad][load][16 bytes].
#pragma once

#include "depthwise.h"
#include "neon_depthwise.h"

namespace lutra {
namespace {

size_t depthwise8_mask_bytes(const DepthwiseShape& s) {
  return static_cast<size_t>(tap_quads(s).count) * kDepthwiseLoads * kRows;
}

void pack_depthwise8_masks(const DepthwiseShape& s, const uint64_t* valid, uint8_t* packed) {
  const TapQuads q = tap_quads(s);
  for (int32_t row = 0; row < kRows; row += kBlock) {
    for (int32_t quad = 0; quad < q.count; ++quad) {
      for (int32_t c = 0; c < kDepthwiseLoads; ++c, packed += 16) {
        vst1q_u8(packed, vdupq_n_u8(0));
        each_tap(s, q, quad, [&](int32_t tap, int32_t byte) {
          for (int32_t i = 0; i < 4; ++i) {
            const uint64_t bit = valid[tap] >> (row + load_row(s.step, 4, c, i)) & 1;
            packed[4 * i + byte] = bit ? 255 : 0;
          }
        });
      }
    }
  }
}

// Sums in the order of the loads -> 16 rows.
template <int kStep>
LUTRA_INLINE void order_rows(const int32x4_t* sum, int32x4_t* rows) {
  const int32x4_t low01 = vzip1q_s32(sum[0], sum[1]), high01 = vzip2q_s32(sum[0], sum[1]);
  const int32x4_t low23 = vzip1q_s32(sum[2], sum[3]), high23 = vzip2q_s32(sum[2], sum[3]);
  if constexpr (kStep == 1) {
    const auto zip1 = [](int32x4_t a, int32x4_t b) {
      return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
    };
    const auto zip2 = [](int32x4_t a, int32x4_t b) {
      return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
    };
    rows[0] = zip1(low01, low23);
    rows[1] = zip2(low01, low23);
    rows[2] = zip1(high01, high23);
    rows[3] = zip2(high01, high23);
  } else {
    rows[0] = low01;
    rows[1] = high01;
    rows[2] = low23;
    rows[3] = high23;
  }
}

template <int kStep, bool kZero, int kQuads>
void depthwise8_outputs(const DepthwiseShape& s, const uint8_t* packed,
                        const DepthwiseTile<uint8_t>& x, int32_t first, int32_t last,
                        const Epilogue& e) {
  const Finish finish(e);
  const TapQuads q = tap_quads(s);
  const int32_t quads = kQuads > 0 ? kQuads : q.count;
  int64_t at[kQuads > 0 ? kQuads : kMaxDepthwiseTaps];
  for (int32_t i = 0; i < quads; ++i) at[i] = x.offset[first_tap(s, q, i)];
  const uint8x16_t zero = vdupq_n_u8(x.zero);
  each_output(s, x, first, last, [&](int32_t m, const uint8_t* plane) {
    const uint8_t* const w = packed + static_cast<size_t>(m) * quads * 4;
    const uint8_t* mask = x.masks;
    for (int32_t row = 0; row < e.rows; row += kBlock) {
      int32x4_t sum[4], rows[4];
      sum[0] = sum[1] = sum[2] = sum[3] = vdupq_n_s32(0);
      for (int32_t i = 0; i < quads; ++i, mask += kDepthwiseLoads * 16) {
        const int8x16_t weight = vreinterpretq_s8_u32(vdupq_n_u32(word_at(w + 4 * i)));
        const uint8_t* const from = plane + at[i] + row * kStep;
#pragma GCC unroll 4
        for (int32_t c = 0; c < kDepthwiseLoads; ++c) {
          const int32_t offset = load_offset<kStep, 4>(c);
          const uint8x16_t v = vld1q_u8(from + offset);
          const uint8x16_t in = vld1q_u8(mask + 16 * c);
          const uint8x16_t value = kZero ? vandq_u8(v, in) : vbslq_u8(in, v, zero);
          sum[c] = vdotq_s32(sum[c], vreinterpretq_s8_u8(value), weight);
        }
      }
      order_rows<kStep>(sum, rows);
      finish.sums(m, row, 0, rows);
    }
  });
}

}  // namespace
}  // namespace lutra
