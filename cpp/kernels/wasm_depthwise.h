// WebAssembly: depthwise layers, int8 and float32. Private to wasm_kernels.h.
#pragma once

#include "wasm_dense.h"

namespace lutra {
namespace {

// f(output, its plane) for outputs first..last-1.
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

// --- int8 ----------------------------------------------------------------------------------------
//
// Two taps of 16 rows are multiplied into 16 bits, which hold both products, and then added to the
// sums. Packed weights are the canonical ones; packed masks: [tap][64 rows], a byte of all bits or
// none.

size_t depthwise8_bytes(const DepthwiseShape& s, int32_t outputs) {
  return static_cast<size_t>(outputs) * s.taps;
}

LUTRA_COLD void pack_depthwise8(const DepthwiseShape& s, int32_t outputs, const int8_t* weights,
                                uint8_t* packed) {
  const size_t count = depthwise8_bytes(s, outputs);
  for (size_t i = 0; i < count; ++i) packed[i] = static_cast<uint8_t>(weights[i]);
}

size_t depthwise8_mask_bytes(const DepthwiseShape& s) {
  return static_cast<size_t>(s.taps) * kRows;
}

LUTRA_COLD void pack_depthwise8_masks(const DepthwiseShape& s, const uint64_t* valid,
                                      uint8_t* packed) {
  for (int32_t t = 0; t < s.taps; ++t) {
    for (int32_t r = 0; r < kRows; ++r) *packed++ = valid[t] >> r & 1 ? 255 : 0;
  }
}

template <int kStep, bool kZero>
struct Taps {
  const uint8_t *plane, *masks;
  const int32_t* offset;
  v128_t zero;
  LUTRA_INLINE v128_t at(int32_t t, int32_t row) const {
    const uint8_t* const from = plane + offset[t] + row * kStep;
    const v128_t in = load(masks + t * kRows + row);
    v128_t v = load(from);
    if constexpr (kStep == 2) {  // every second byte
      v = wasm_i8x16_shuffle(v, load(from + 16), 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26,
                             28, 30);
    }
    return kZero ? wasm_v128_and(v, in) : wasm_v128_bitselect(v, zero, in);
  }
};

// 16 rows of a tap, in 16 bits, times its weight.
LUTRA_INLINE v128_t low_products(v128_t x, v128_t w) {
  return wasm_i16x8_mul(wasm_u16x8_extend_low_u8x16(x), w);
}
LUTRA_INLINE v128_t high_products(v128_t x, v128_t w) {
  return wasm_i16x8_mul(wasm_u16x8_extend_high_u8x16(x), w);
}
LUTRA_INLINE void add_words(v128_t low, v128_t high, v128_t* total) {
  total[0] = wasm_i32x4_add(total[0], wasm_i32x4_extend_low_i16x8(low));
  total[1] = wasm_i32x4_add(total[1], wasm_i32x4_extend_high_i16x8(low));
  total[2] = wasm_i32x4_add(total[2], wasm_i32x4_extend_low_i16x8(high));
  total[3] = wasm_i32x4_add(total[3], wasm_i32x4_extend_high_i16x8(high));
}

template <int kStep, bool kZero>
void depthwise8_outputs(const DepthwiseShape& s, const uint8_t* packed,
                        const DepthwiseTile<uint8_t>& x, int32_t first, int32_t last,
                        const Epilogue& e) {
  const Finish finish(e);
  each_output(s, x, first, last, [&](int32_t m, const uint8_t* plane) {
    const int8_t* const w =
        reinterpret_cast<const int8_t*>(packed) + static_cast<size_t>(m) * s.taps;
    const Taps<kStep, kZero> taps = {plane, x.masks, x.offset,
                                     wasm_i8x16_splat(static_cast<int8_t>(x.zero))};
    for (int32_t row = 0; row < e.rows; row += kBlock) {
      v128_t sum[4];
      sum[0] = sum[1] = sum[2] = sum[3] = zeros();
      int32_t t = 0;
      for (; t + 2 <= s.taps; t += 2) {
        const v128_t a = taps.at(t, row), b = taps.at(t + 1, row);
        const v128_t u = wasm_i16x8_splat(w[t]), v = wasm_i16x8_splat(w[t + 1]);
        add_words(wasm_i16x8_add(low_products(a, u), low_products(b, v)),
                  wasm_i16x8_add(high_products(a, u), high_products(b, v)), sum);
      }
      if (t < s.taps) {
        const v128_t a = taps.at(t, row), u = wasm_i16x8_splat(w[t]);
        add_words(low_products(a, u), high_products(a, u), sum);
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

// --- float32 -------------------------------------------------------------------------------------

// Values of 4 rows, 0 where their bits are.
LUTRA_INLINE v128_t masked(v128_t v, uint64_t valid) {
  const v128_t bit = wasm_i32x4_const(1, 2, 4, 8);
  const v128_t in = wasm_v128_and(wasm_i32x4_splat(static_cast<int32_t>(valid)), bit);
  return wasm_v128_and(v, wasm_i32x4_eq(in, bit));
}

// 4 rows at a time.
void depthwise(const DepthwiseShape& s, const float* weights, const DepthwiseTile<float>& x,
               int32_t first, int32_t last, const Epilogue& e) {
  const Finish finish(e);
  const uint64_t* const valid = reinterpret_cast<const uint64_t*>(x.masks);
  each_output(s, x, first, last, [&](int32_t m, const float* plane) {
    const float* const w = weights + static_cast<size_t>(m) * s.taps;
    const auto at = [&](int32_t t, int32_t row) {
      return masked(load(plane + x.offset[t] + row), valid[t] >> row);
    };
    v128_t light = zeros();
    for (int32_t t = 0; t < s.taps; ++t) light = wasm_v128_or(light, tiny(wasm_f32x4_splat(w[t])));
    for (int32_t row = 0; row < e.rows; row += kBlock) {
      v128_t sums[4];
      for (int32_t q = 0; q < 4; ++q) {
        v128_t low = zeros(), high = low, doubt = light;
        for (int32_t t = 0; t < s.taps; ++t) {
          const v128_t v = at(t, row + 4 * q);
          const v128_t factor = wasm_f64x2_splat(static_cast<double>(w[t]));
          doubt = wasm_v128_or(doubt, tiny(v));
          add_product(promote_low(v), factor, low, doubt);
          add_product(promote_high(v), factor, high, doubt);
        }
        sums[q] = demote(low, high);
        if (wasm_v128_any_true(doubt)) [[unlikely]] {
          sums[q] = zeros();
          for (int32_t t = 0; t < s.taps; ++t) {
            sums[q] = fused(wasm_f32x4_splat(w[t]), at(t, row + 4 * q), sums[q]);
          }
        }
      }
      finish.float_sums(m, row, sums);
    }
  });
}

}  // namespace
}  // namespace lutra
