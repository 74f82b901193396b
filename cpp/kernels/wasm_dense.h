// WebAssembly: dense layers in float32. Private to the files of wasm_kernels.h.
#pragma once

#include "wasm_common.h"

namespace lutra {
namespace {

// Chains of multiply-adds in float64, as wasm_fma.h says: a sum is rounded to a float at every
// step, and whether that was doubtful is noted once for a whole chain, which is then made again
// slowly.

// Two sums, of which the doubles are floats.
LUTRA_INLINE void add_product(v128_t x, v128_t w, v128_t& sum, v128_t& doubt) {
  const v128_t s = wasm_f64x2_add(wasm_f64x2_mul(x, w), sum);
  const v128_t rounded = wasm_f32x4_demote_f64x2_zero(s);
  sum = promote_low(rounded);
  doubt = wasm_v128_or(doubt, doubtful_halves(s));
}

// Rows row.. of a tile, 4 of them, for the four outputs of a block, one chain after the other.
[[gnu::noinline, gnu::cold]] void gemm_slowly(const float* patch, size_t depth,
                                              const float* weights, v128_t* sum) {
  for (int32_t j = 0; j < kGemmOutputs; ++j) {
    sum[j] = zeros();
    for (size_t d = 0; d < depth; ++d) {
      const v128_t w = wasm_v128_load32_splat(weights + d * kGemmOutputs + j);
      sum[j] = fused(w, load(patch + d * kRows), sum[j]);
    }
  }
}

// Can a product be so small that what it adds to a sum is lost below the smallest float?
LUTRA_INLINE v128_t tiny(v128_t x) {
  const v128_t size = wasm_v128_and(x, wasm_i32x4_splat(0x7fffffff));
  const v128_t below = wasm_i32x4_lt(size, wasm_i32x4_splat(kTinyBits));
  return wasm_v128_andnot(below, wasm_i32x4_eq(size, zeros()));
}

void gemm(const float* patch, size_t depth, const float* weights, int32_t outputs,
          const Epilogue& e) {
  const Finish finish(e);
  v128_t small[kRows / 4] = {};
  for (int32_t row = 0; row < e.rows; row += 4) {
    for (size_t d = 0; d < depth; ++d) {
      small[row / 4] = wasm_v128_or(small[row / 4], tiny(load(patch + d * kRows + row)));
    }
  }
  for (int32_t m = 0; m < outputs; m += kGemmOutputs, weights += depth * kGemmOutputs) {
    v128_t light = zeros();
    for (size_t d = 0; d < depth; ++d) {
      light = wasm_v128_or(light, tiny(load(weights + d * kGemmOutputs)));
    }
    for (int32_t row = 0; row < e.rows; row += kBlock) {
      v128_t sums[kGemmOutputs][4];
      for (int32_t q = 0; q < 4; ++q) {
        const float* const x = patch + row + 4 * q;
        v128_t s[kGemmOutputs][2], doubt = wasm_v128_or(light, small[row / 4 + q]);
#pragma GCC unroll 4
        for (auto& one : s) one[0] = one[1] = zeros();
        for (size_t d = 0; d < depth; ++d) {
          const v128_t low = promote_low(wasm_v128_load64_zero(x + d * kRows));
          const v128_t high = promote_low(wasm_v128_load64_zero(x + d * kRows + 2));
#pragma GCC unroll 4
          for (int32_t j = 0; j < kGemmOutputs; ++j) {
            const v128_t w = wasm_f64x2_splat(static_cast<double>(weights[d * kGemmOutputs + j]));
            add_product(low, w, s[j][0], doubt);
            add_product(high, w, s[j][1], doubt);
          }
        }
        v128_t made[kGemmOutputs];
#pragma GCC unroll 4
        for (int32_t j = 0; j < kGemmOutputs; ++j) made[j] = demote(s[j][0], s[j][1]);
        if (wasm_v128_any_true(doubt)) [[unlikely]]
          gemm_slowly(x, depth, weights, made);
        for (int32_t j = 0; j < kGemmOutputs; ++j) sums[j][q] = made[j];
      }
      for (int32_t j = 0; j < kGemmOutputs && m + j < outputs; ++j) {
        finish.float_sums(m + j, row, sums[j]);
      }
    }
  }
}

// Outputs are the lanes: 16 of them at a time.
void linear(const float* x, size_t x_stride, size_t depth, const float* weights, const float* bias,
            int32_t outputs, float* y) {
  v128_t small = zeros();
  for (size_t d = 0; d < depth; ++d) {
    small = wasm_v128_or(small, tiny(wasm_f32x4_splat(x[d * x_stride])));
  }
  for (int32_t m = 0; m < round_up(outputs, kLinearOutputs); m += 4) {
    const float* const w = weights +
                           static_cast<size_t>(m / kLinearOutputs) * depth * kLinearOutputs +
                           m % kLinearOutputs;
    v128_t low = zeros(), high = low, doubt = small;
    for (size_t d = 0; d < depth; ++d) {
      const v128_t v = wasm_f64x2_splat(static_cast<double>(x[d * x_stride]));
      const v128_t four = load(w + d * kLinearOutputs);
      doubt = wasm_v128_or(doubt, tiny(four));
      add_product(v, promote_low(four), low, doubt);
      add_product(v, promote_high(four), high, doubt);
    }
    v128_t sum = demote(low, high);
    if (wasm_v128_any_true(doubt)) [[unlikely]] {
      sum = zeros();
      for (size_t d = 0; d < depth; ++d) {
        sum = fused(load(w + d * kLinearOutputs), wasm_f32x4_splat(x[d * x_stride]), sum);
      }
    }
    store(y + m, sum);
    for (int32_t j = m; j < m + 4 && j < outputs; ++j) y[j] = y[j] + bias[j];
  }
}

}  // namespace
}  // namespace lutra
