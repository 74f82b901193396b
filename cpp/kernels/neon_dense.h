// NEON: dense layers, int8 and float32. Private to neon.cc and neon_dot.cc.
//
// Activations have at most 7 bits: they are s8 as well as u8, as smull and sdot want them.
#pragma once

#include "neon_common.h"

namespace lutra {
namespace {

LUTRA_INLINE int32_t quads_of(int32_t depth) { return (depth + 3) / 4; }

// Packed weights: [4 outputs][quad][output][4], zero padded: a register for each quad.
size_t dense8_bytes(int32_t depth, int32_t outputs) {
  return static_cast<size_t>((outputs + kOutputs - 1) / kOutputs) * quads_of(depth) * 16;
}

void pack_dense8(int32_t depth, int32_t outputs, const int8_t* weights, uint8_t* packed) {
  for (int32_t block = 0; block < outputs; block += kOutputs) {
    for (int32_t d = 0; d < depth; d += 4) {
      for (int32_t i = 0; i < 16; ++i) {
        const int32_t m = block + i / 4, at = d + i % 4;
        const bool there = m < outputs && at < depth;
        *packed++ =
            there ? static_cast<uint8_t>(weights[static_cast<size_t>(m) * depth + at]) : uint8_t{0};
      }
    }
  }
}

// Gathered: block after block of 16 rows, [quad][64]. With dot products (row, 4 entries); without
// them (row, 2 entries) of the first two, then of the other two: smull and smlal add the products
// of entries 0 and 2, and of 1 and 3, of 4 rows, and sadalp adds these two.
size_t gather8_bytes(int32_t depth) { return static_cast<size_t>(quads_of(depth)) * 4 * kRows; }

LUTRA_INLINE void store_quad(uint8_t* to, uint8x16_t a, uint8x16_t b, uint8x16_t c, uint8x16_t d) {
#ifdef __ARM_FEATURE_DOTPROD
  store_quads(to, a, b, c, d);
#else
  vst1q_u8(to, vzip1q_u8(a, b));
  vst1q_u8(to + 16, vzip2q_u8(a, b));
  vst1q_u8(to + 32, vzip1q_u8(c, d));
  vst1q_u8(to + 48, vzip2q_u8(c, d));
#endif
}

template <typename Loader>
LUTRA_INLINE void gather_block(int32_t depth, int32_t taps, const Patch& p, const Loader& rows,
                               uint8_t* to) {
  Entries walk(p, taps, 0);
  const uint8x16_t zero = vdupq_n_u8(0);
  int32_t d = 0;
  for (; d + 4 <= depth; d += 4, to += 64) {
    const uint8x16_t a = rows.load(walk.next()), b = rows.load(walk.next());
    const uint8x16_t c = rows.load(walk.next());
    store_quad(to, a, b, c, rows.load(walk.next()));
  }
  if (d == depth) return;
  const uint8x16_t a = rows.load(walk.next());
  const uint8x16_t b = d + 1 < depth ? rows.load(walk.next()) : zero;
  store_quad(to, a, b, d + 2 < depth ? rows.load(walk.next()) : zero, zero);
}

void gather8(int32_t depth, int32_t taps, const Patch& p, uint8_t* gathered) {
  for (int32_t row = 0; row < p.rows; row += kBlock, gathered += quads_of(depth) * 64) {
    Rows rows;
    find_rows(p, row, &rows);
    with_rows(rows, [&](const auto& loader) { gather_block(depth, taps, p, loader, gathered); });
  }
}

// A quad of 4 outputs x 16 rows.
#ifdef __ARM_FEATURE_DOTPROD
template <int kLane>
LUTRA_INLINE void dot_lane(const int8x16_t* x, int8x16_t w, int32x4_t* sum) {
  for (int32_t r = 0; r < 4; ++r) sum[r] = vdotq_laneq_s32(sum[r], x[r], w, kLane);
}
template <int... kLane>
LUTRA_INLINE void dot_lanes(Lanes<kLane...>, const int8x16_t* x, int8x16_t w, int32x4_t (*sum)[4]) {
  (dot_lane<kLane>(x, w, sum[kLane]), ...);
}
LUTRA_INLINE void add_quad(const int8_t* w, const int8_t* x, int32x4_t (*sum)[4]) {
  const int8x16_t rows[4] = {vld1q_s8(x), vld1q_s8(x + 16), vld1q_s8(x + 32), vld1q_s8(x + 48)};
  dot_lanes(FourLanes(), rows, vld1q_s8(w), sum);
}
#else
LUTRA_INLINE int8x16_t pair_of_weights(const int8_t* w) {
  int16_t pair;
  __builtin_memcpy(&pair, w, sizeof pair);
  return vreinterpretq_s8_s16(vdupq_n_s16(pair));
}
// Two products of at most 127 * 127 fit 16 bits.
LUTRA_INLINE void add_quad(const int8_t* w, const int8_t* x, int32x4_t (*sum)[4]) {
  const int8x16_t a0 = vld1q_s8(x), a1 = vld1q_s8(x + 16);
  const int8x16_t b0 = vld1q_s8(x + 32), b1 = vld1q_s8(x + 48);
  for (int32_t j = 0; j < kOutputs; ++j) {
    const int8x16_t u = pair_of_weights(w + 4 * j), v = pair_of_weights(w + 4 * j + 2);
    const int16x8_t p0 =
        vmlal_s8(vmull_s8(vget_low_s8(a0), vget_low_s8(u)), vget_low_s8(b0), vget_low_s8(v));
    const int16x8_t p2 =
        vmlal_s8(vmull_s8(vget_low_s8(a1), vget_low_s8(u)), vget_low_s8(b1), vget_low_s8(v));
    sum[j][0] = vpadalq_s16(sum[j][0], p0);
    sum[j][1] = vpadalq_s16(sum[j][1], vmlal_high_s8(vmull_high_s8(a0, u), b0, v));
    sum[j][2] = vpadalq_s16(sum[j][2], p2);
    sum[j][3] = vpadalq_s16(sum[j][3], vmlal_high_s8(vmull_high_s8(a1, u), b1, v));
  }
}
#endif

void dense8(int32_t depth, int32_t, const uint8_t* packed, const uint8_t* gathered, int32_t first,
            int32_t last, const Epilogue& e) {
  const Finish finish(e);
  const size_t quads = static_cast<size_t>(quads_of(depth));
  for (int32_t m = first; m < last; m += kOutputs) {
    const int8_t* const w = reinterpret_cast<const int8_t*>(packed) + m / kOutputs * quads * 16;
    const int8_t* x = reinterpret_cast<const int8_t*>(gathered);
    for (int32_t row = 0; row < e.rows; row += kBlock, x += quads * 64) {
      int32x4_t sum[kOutputs][4];
      for (auto& s : sum) s[0] = s[1] = s[2] = s[3] = vdupq_n_s32(0);
      for (size_t i = 0; i < quads; ++i) add_quad(w + 16 * i, x + 64 * i, sum);
      for (int32_t j = 0; j < kOutputs && m + j < last; ++j) finish.sums(m + j, row, 0, sum[j]);
    }
  }
}

// One row times a block of 4 outputs, which are the lanes.
#ifdef __ARM_FEATURE_DOTPROD
LUTRA_INLINE int32x4_t dense_row(const int8_t* w, const int8_t* x, int32_t quads) {
  int32x4_t even = vdupq_n_s32(0), odd = even;
  int32_t i = 0;
  for (; i + 4 <= quads; i += 4) {
    const int8x16_t v = vld1q_s8(x + 4 * i);
    even = vdotq_laneq_s32(even, vld1q_s8(w + 16 * i), v, 0);
    odd = vdotq_laneq_s32(odd, vld1q_s8(w + 16 * i + 16), v, 1);
    even = vdotq_laneq_s32(even, vld1q_s8(w + 16 * i + 32), v, 2);
    odd = vdotq_laneq_s32(odd, vld1q_s8(w + 16 * i + 48), v, 3);
  }
  for (; i < quads; ++i) {
    const int8x16_t v = vreinterpretq_s8_u32(vdupq_n_u32(word_at(x + 4 * i)));
    even = vdotq_s32(even, vld1q_s8(w + 16 * i), v);
  }
  return vaddq_s32(even, odd);
}
#else
LUTRA_INLINE int32x4_t dense_row(const int8_t* w, const int8_t* x, int32_t quads) {
  int32x4_t low = vdupq_n_s32(0), high = low;  // sums of pairs of entries, of 2 outputs each
  int32_t i = 0;
  for (; i + 2 <= quads; i += 2) {
    const int8x16_t u = vreinterpretq_s8_u32(vdupq_n_u32(word_at(x + 4 * i)));
    const int8x16_t v = vreinterpretq_s8_u32(vdupq_n_u32(word_at(x + 4 * i + 4)));
    const int8x16_t a = vld1q_s8(w + 16 * i), b = vld1q_s8(w + 16 * i + 16);
    low = vpadalq_s16(
        low, vmlal_s8(vmull_s8(vget_low_s8(a), vget_low_s8(u)), vget_low_s8(b), vget_low_s8(v)));
    high = vpadalq_s16(high, vmlal_high_s8(vmull_high_s8(a, u), b, v));
  }
  if (i < quads) {
    const int8x16_t u = vreinterpretq_s8_u32(vdupq_n_u32(word_at(x + 4 * i)));
    const int8x16_t a = vld1q_s8(w + 16 * i);
    low = vpadalq_s16(low, vmull_s8(vget_low_s8(a), vget_low_s8(u)));
    high = vpadalq_s16(high, vmull_high_s8(a, u));
  }
  return vpaddq_s32(low, high);
}
#endif

void dense8_row(int32_t depth, int32_t, const uint8_t* packed, const uint8_t* x, int32_t first,
                int32_t last, int32_t* sums) {
  const int32_t quads = quads_of(depth);
  for (int32_t m = first; m < last; m += kOutputs) {
    const size_t block = static_cast<size_t>(m / kOutputs) * quads * 16;
    const int32x4_t sum = dense_row(reinterpret_cast<const int8_t*>(packed) + block,
                                    reinterpret_cast<const int8_t*>(x), quads);
    if (m + kOutputs <= last) {
      vst1q_s32(sums + m - first, sum);
      continue;
    }
    int32_t lanes[kOutputs];
    vst1q_s32(lanes, sum);
    for (int32_t j = 0; m + j < last; ++j) sums[m + j - first] = lanes[j];
  }
}

// --- float32 -------------------------------------------------------------------------------------

template <int kLane>
LUTRA_INLINE void multiply_lane(const float32x4_t* x, float32x4_t w, float32x4_t* sum) {
  for (int32_t r = 0; r < 4; ++r) sum[r] = vfmaq_laneq_f32(sum[r], x[r], w, kLane);
}
template <int... kLane>
LUTRA_INLINE void multiply_lanes(Lanes<kLane...>, const float32x4_t* x, float32x4_t w,
                                 float32x4_t (*sum)[4]) {
  (multiply_lane<kLane>(x, w, sum[kLane]), ...);
}

// 16 rows x 4 outputs at a time: 16 sums, five loads for 16 multiply-adds.
void gemm(const float* patch, size_t depth, const float* weights, int32_t outputs,
          const Epilogue& e) {
  const Finish finish(e);
  for (int32_t m = 0; m < outputs; m += kGemmOutputs, weights += depth * kGemmOutputs) {
    for (int32_t row = 0; row < e.rows; row += kBlock) {
      float32x4_t sum[kGemmOutputs][4];
      for (auto& s : sum) s[0] = s[1] = s[2] = s[3] = vdupq_n_f32(0.0f);
      for (size_t d = 0; d < depth; ++d) {
        const float* const from = patch + d * kRows + row;
        const float32x4_t x[4] = {vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8),
                                  vld1q_f32(from + 12)};
        multiply_lanes(FourLanes(), x, vld1q_f32(weights + d * kGemmOutputs), sum);
      }
      for (int32_t j = 0; j < kGemmOutputs && m + j < outputs; ++j) {
        finish.sums(m + j, row, sum[j]);
      }
    }
  }
}

void linear(const float* x, size_t x_stride, size_t depth, const float* weights, const float* bias,
            int32_t outputs, float* y) {
  for (int32_t m = 0; m < outputs; m += kLinearOutputs) {
    float32x4_t sum[16];
    for (float32x4_t& s : sum) s = vdupq_n_f32(0.0f);
    for (size_t d = 0; d < depth; ++d, weights += kLinearOutputs) {
      const float32x4_t v = vdupq_n_f32(x[d * x_stride]);
#pragma GCC unroll 16
      for (int32_t q = 0; q < 16; ++q) sum[q] = vfmaq_f32(sum[q], vld1q_f32(weights + 4 * q), v);
    }
    for (int32_t q = 0; q < 16; ++q) vst1q_f32(y + m + 4 * q, sum[q]);
    for (int32_t j = m; j < m + kLinearOutputs && j < outputs; ++j) y[j] = y[j] + bias[j];
  }
}

}  // namespace
}  // namespace lutra
