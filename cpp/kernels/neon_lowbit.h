// Low-bit weights. Private to neon.cc and neon_dot.cc; lowbit.h has the order of packed weights,
// and lowbit_tables.h the kernel of tables, which is written in the words at the end of this file.
#pragma once

#include "lowbit.h"
#include "neon_common.h"

namespace lutra {
namespace {

float lowbit_quantize(const float* x, size_t n, int8_t* q) {
  // Magnitudes as integers: infinities and NaN are above all numbers.
  const int32x4_t magnitude = vdupq_n_s32(0x7fffffff);
  int32x4_t most = vdupq_n_s32(0);
  size_t i = 0;
  for (; i + 4 <= n; i += 4) {
    most = vmaxq_s32(most, vandq_s32(vreinterpretq_s32_f32(vld1q_f32(x + i)), magnitude));
  }
  int32_t top_bits = vmaxvq_s32(most);
  for (; i < n; ++i) {
    const int32_t bits = static_cast<int32_t>(word_at(x + i) & 0x7fffffffu);
    top_bits = bits > top_bits ? bits : top_bits;
  }
  if (top_bits >= kInfinityBits) return no_row(n, q);
  const float top = __builtin_bit_cast(float, top_bits);
  const bool zero = top < 0x1p-120f;
  const float inverse = zero ? 0.0f : 127.0f / top;
  for (i = 0; i < n; i += kBlock) {
    const int32_t count = n - i < kBlock ? static_cast<int32_t>(n - i) : kBlock;
    float tail[kBlock] = {};
    for (int32_t j = 0; count < kBlock && j < count; ++j) tail[j] = x[i + j];
    const float* const from = count < kBlock ? tail : x + i;
    int32x4_t v[4];
    for (int32_t j = 0; j < 4; ++j) {
      v[j] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(from + 4 * j), inverse));
    }
    store_bytes(reinterpret_cast<uint8_t*>(q + i), narrow_words(v), count);
  }
  return zero ? 0.0f : top / 127.0f;
}

// to[i] = v[i], i < count; v are four outputs each.
LUTRA_INLINE void store_sums(int32_t* to, const int32x4_t* v, int32_t count) {
  int32_t some[kLowBitOutputs];
  int32_t* const at = count < kLowBitOutputs ? some : to;
  for (int32_t i = 0; i < 4; ++i) vst1q_s32(at + 4 * i, v[i]);
  for (int32_t i = 0; count < kLowBitOutputs && i < count; ++i) to[i] = some[i];
}

// --- the dense kernel ---------------------------------------------------------------------------
//
// 16 outputs x kRowsAtOnce rows. A block of 64 bytes becomes, field after field, four registers of
// four neighbouring weights of four outputs.

// Field j of each byte.
template <int kBits, int kField>
LUTRA_INLINE int8x16_t field(uint8x16_t bytes) {
  if constexpr (kField > 0) bytes = vshrq_n_u8(bytes, kBits * kField);
  if constexpr (kBits * (kField + 1) < 8) bytes = vandq_u8(bytes, vdupq_n_u8((1 << kBits) - 1));
  return vreinterpretq_s8_u8(bytes);
}

// Four activations of a row for each of four outputs.
LUTRA_INLINE int8x16_t broadcast_word(const int8_t* x) {
  return vreinterpretq_s8_u32(vdupq_n_u32(word_at(x)));
}

#ifdef __ARM_FEATURE_DOTPROD

// Products go to 32 bits at once, so there is nothing to count: an sdot for 16 of them.
template <int kRowsAtOnce>
struct DenseSums {
  int32x4_t total[kRowsAtOnce][4];

  LUTRA_INLINE DenseSums() {
    for (int32_t r = 0; r < kRowsAtOnce; ++r) {
      for (int32_t i = 0; i < 4; ++i) total[r][i] = vdupq_n_s32(0);
    }
  }
  LUTRA_INLINE void add(int32_t r, const int8x16_t* w, int8x16_t v) {
    for (int32_t i = 0; i < 4; ++i) total[r][i] = vdotq_s32(total[r][i], w[i], v);
  }
  LUTRA_INLINE void flush() {}
  LUTRA_INLINE int32x4_t sums(int32_t r, int32_t i) const { return total[r][i]; }
};
constexpr int32_t kDenseRows = 4;
inline int32_t dense_most(int32_t, int32_t) { return 1 << 30; }

#else

// Lane k of a 16-bit sum is that of weight k % 4 of an output: of so many products as fit, before
// they are added to 32 bits in pairs. An smlal for 8 products.
template <int kRowsAtOnce>
struct DenseSums {
  int16x8_t sum[kRowsAtOnce][8];
  int32x4_t total[kRowsAtOnce][8];

  LUTRA_INLINE DenseSums() {
    for (int32_t r = 0; r < kRowsAtOnce; ++r) {
      for (int32_t i = 0; i < 8; ++i) {
        sum[r][i] = vdupq_n_s16(0);
        total[r][i] = vdupq_n_s32(0);
      }
    }
  }
  LUTRA_INLINE void add(int32_t r, const int8x16_t* w, int8x16_t v) {
    for (int32_t i = 0; i < 4; ++i) {
      sum[r][2 * i] = vmlal_s8(sum[r][2 * i], vget_low_s8(w[i]), vget_low_s8(v));
      sum[r][2 * i + 1] = vmlal_high_s8(sum[r][2 * i + 1], w[i], v);
    }
  }
  LUTRA_INLINE void flush() {
    for (int32_t r = 0; r < kRowsAtOnce; ++r) {
      for (int32_t i = 0; i < 8; ++i) {
        total[r][i] = vpadalq_s16(total[r][i], sum[r][i]);
        sum[r][i] = vdupq_n_s16(0);
      }
    }
  }
  LUTRA_INLINE int32x4_t sums(int32_t r, int32_t i) const {
    return vpaddq_s32(total[r][2 * i], total[r][2 * i + 1]);
  }
};
constexpr int32_t kDenseRows = 2;
// Blocks whose products fit: |x| <= 128, one product of each field.
inline int32_t dense_most(int32_t levels, int32_t fields) {
  return 32767 / ((levels - 1) * 128 * fields);
}

#endif

template <int kBits, int kRowsAtOnce, int... kField>
LUTRA_INLINE void dense_block(const uint8_t* weights, const int8_t* x, int32_t width,
                              DenseSums<kRowsAtOnce>& s, Lanes<kField...>) {
  const uint8x16x4_t bytes = {
      {vld1q_u8(weights), vld1q_u8(weights + 16), vld1q_u8(weights + 32), vld1q_u8(weights + 48)}};
  const auto step = [&]<int kOne>(Lanes<kOne>) __attribute__((always_inline)) {
    const int8x16_t w[4] = {field<kBits, kOne>(bytes.val[0]), field<kBits, kOne>(bytes.val[1]),
                            field<kBits, kOne>(bytes.val[2]), field<kBits, kOne>(bytes.val[3])};
    const int8_t* const at = x + static_cast<size_t>(kOne) * 4 * width;
    for (int32_t r = 0; r < kRowsAtOnce; ++r) s.add(r, w, broadcast_word(at + 4 * r));
  };
  (step(Lanes<kField>{}), ...);
}

template <int kBits, int kRowsAtOnce, typename AllFields>
void dense_outputs(int32_t levels, int32_t blocks, const uint8_t* weights, const int8_t* x,
                   int32_t width, int32x4_t (&out)[kRowsAtOnce][4]) {
  constexpr int32_t kFields = 8 / kBits;
  const int32_t most = dense_most(levels, kFields);  // at least 8
  DenseSums<kRowsAtOnce> s;
  while (blocks > 0) {
    const int32_t count = blocks < most ? blocks : most;
    blocks -= count;
    for (int32_t b = 0; b < count; ++b, weights += 64, x += kFields * 4 * width) {
      dense_block<kBits>(weights, x, width, s, AllFields{});
    }
    s.flush();
  }
  for (int32_t r = 0; r < kRowsAtOnce; ++r) {
    for (int32_t i = 0; i < 4; ++i) out[r][i] = s.sums(r, i);
  }
}

template <int kBits, int kRowsAtOnce, typename AllFields>
void dense_range(const LowBitShape& s, const uint8_t* packed, const int8_t* x, int32_t width,
                 int32_t rows, int32_t first, int32_t last, int32_t* sums, size_t stride) {
  const int32_t blocks = dense_blocks(s);
  const uint8_t* weights = packed + static_cast<size_t>(first / kLowBitOutputs) * blocks * 64;
  for (int32_t m = first; m < last; m += kLowBitOutputs) {
    for (int32_t from = 0; from < rows; from += kRowsAtOnce) {
      int32x4_t out[kRowsAtOnce][4];
      dense_outputs<kBits, kRowsAtOnce, AllFields>(s.levels, blocks, weights, x + 4 * from, width,
                                                   out);
      for (int32_t r = 0; r < kRowsAtOnce && from + r < rows; ++r) {
        store_sums(sums + (from + r) * stride + (m - first), out[r], last - m);
      }
    }
    weights += static_cast<size_t>(blocks) * 64;
  }
}

template <int kBits, typename AllFields>
void dense_rows(const LowBitShape& s, const uint8_t* packed, const int8_t* x, int32_t width,
                int32_t rows, int32_t first, int32_t last, int32_t* sums, size_t stride) {
  const auto range = width == 1           ? dense_range<kBits, 1, AllFields>
                     : width < kDenseRows ? dense_range<kBits, 2, AllFields>
                                          : dense_range<kBits, kDenseRows, AllFields>;
  range(s, packed, x, width, rows, first, last, sums, stride);
}

template <int kBits>
void dense_widths(const LowBitShape& s, const uint8_t* packed, const int8_t* x, int32_t width,
                  int32_t rows, int32_t first, int32_t last, int32_t* sums, size_t stride) {
  if constexpr (kBits == 1) {
    dense_rows<1, EightLanes>(s, packed, x, width, rows, first, last, sums, stride);
  } else if constexpr (kBits == 2) {
    dense_rows<2, FourLanes>(s, packed, x, width, rows, first, last, sums, stride);
  } else {
    dense_rows<4, Lanes<0, 1>>(s, packed, x, width, rows, first, last, sums, stride);
  }
}

void lowbit_finish(const LowBitFinish& f, int32_t rows, int32_t outputs, const int32_t* sums,
                   size_t sums_stride, float* out, size_t out_stride) {
  const LowBitFinish g = f;  // no store changes it
  for (int32_t r = 0; r < rows; ++r, sums += sums_stride, out += out_stride) {
    const int32_t x_sum = g.x_sum[r];
    const float row_scale = g.row_scale ? g.row_scale[r] : 1.0f;
    // Four outputs. Sums of integers wrap, because the parts of one that fits may be larger.
    const auto finish = [&](const int32_t* sum, const int32_t* zero, const float* scale,
                            const float* before) {
      int32x4_t plus = vdupq_n_s32(g.plus);
      if (zero) plus = vsubq_s32(plus, vld1q_s32(zero));
      const int32x4_t d = vmlaq_n_s32(vmulq_n_s32(vld1q_s32(sum), g.times), plus, x_sum);
      float32x4_t y = vmulq_f32(vcvtq_f32_s32(d), vld1q_f32(scale));
      if (!g.first) y = vaddq_f32(vld1q_f32(before), y);
      return g.row_scale ? vmulq_n_f32(y, row_scale) : y;
    };
    int32_t m = 0;
    for (; m + 4 <= outputs; m += 4) {
      vst1q_f32(out + m, finish(sums + m, g.zero ? g.zero + m : nullptr, g.scale + m, out + m));
    }
    if (m == outputs) continue;
    int32_t sum[4] = {}, zero[4] = {};
    float scale[4] = {}, y[4] = {};
    for (int32_t i = 0; m + i < outputs; ++i) {
      sum[i] = sums[m + i];
      scale[i] = g.scale[m + i];
      if (g.zero) zero[i] = g.zero[m + i];
      if (!g.first) y[i] = out[m + i];
    }
    vst1q_f32(y, finish(sum, g.zero ? zero : nullptr, scale, y));
    for (int32_t i = 0; m + i < outputs; ++i) out[m + i] = y[i];
  }
}

// --- words of lowbit_tables.h -------------------------------------------------------------------

constexpr int32_t kWordLanes = 8;
using Words = int16x8_t;

LUTRA_INLINE Words load_words(const int16_t* p) { return vld1q_s16(p); }
LUTRA_INLINE void store_words(int16_t* p, Words v) { vst1q_s16(p, v); }
LUTRA_INLINE Words add_words(Words a, Words b) { return vaddq_s16(a, b); }
LUTRA_INLINE Words sub_words(Words a, Words b) { return vsubq_s16(a, b); }
LUTRA_INLINE Words widen_bytes(const int8_t* p) { return vmovl_s8(vld1_s8(p)); }
// to[i] = v[i], or += v[i]
LUTRA_INLINE void flush_words(Words v, int32_t* to, bool first) {
  const int32x4_t none = vdupq_n_s32(0);
  vst1q_s32(to, vaddw_s16(first ? none : vld1q_s32(to), vget_low_s16(v)));
  vst1q_s32(to + 4, vaddw_high_s16(first ? none : vld1q_s32(to + 4), v));
}

// A square of sums.
constexpr int32_t kSquare = 4;
using Dwords = int32x4_t;
LUTRA_INLINE Dwords load_dwords(const int32_t* p) { return vld1q_s32(p); }
LUTRA_INLINE Dwords no_dwords() { return vdupq_n_s32(0); }
// The first `count`.
LUTRA_INLINE void store_dwords(int32_t* p, int32_t count, Dwords v) {
  if (count >= 4) return vst1q_s32(p, v);
  int32_t some[4];
  vst1q_s32(some, v);
  for (int32_t i = 0; i < count; ++i) p[i] = some[i];
}
LUTRA_INLINE void transpose_square(Dwords (&a)[kSquare]) {
  const int64x2_t low01 = vreinterpretq_s64_s32(vzip1q_s32(a[0], a[1]));
  const int64x2_t high01 = vreinterpretq_s64_s32(vzip2q_s32(a[0], a[1]));
  const int64x2_t low23 = vreinterpretq_s64_s32(vzip1q_s32(a[2], a[3]));
  const int64x2_t high23 = vreinterpretq_s64_s32(vzip2q_s32(a[2], a[3]));
  a[0] = vreinterpretq_s32_s64(vzip1q_s64(low01, low23));
  a[1] = vreinterpretq_s32_s64(vzip2q_s64(low01, low23));
  a[2] = vreinterpretq_s32_s64(vzip1q_s64(high01, high23));
  a[3] = vreinterpretq_s32_s64(vzip2q_s64(high01, high23));
}

}  // namespace
}  // namespace lutra
