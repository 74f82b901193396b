// NEON: what training needs of lookup layers. Private to neon.cc and neon_dot.cc.
#pragma once

#include "neon_common.h"

namespace lutra {
namespace {

constexpr int32_t kGradCells = 8;    // accumulators of one pass
constexpr size_t kGradBlock = 2048;  // floats that are added up in single precision at most

void table_grad(const uint8_t* codes, size_t code_stride, int32_t codebooks, int32_t centroids,
                const float* rows, int32_t count, int32_t outputs, float* grad) {
  for (int32_t r = 0; r < count; ++r) {
    const float* const y = rows + static_cast<size_t>(r) * outputs;
    for (int32_t b = 0; b < codebooks; ++b) {
      const size_t cell = static_cast<size_t>(b) * centroids + codes[b * code_stride + r];
      float* const g = grad + cell * outputs;
      int32_t m = 0;
      for (; m + 4 <= outputs; m += 4) {
        vst1q_f32(g + m, vaddq_f32(vld1q_f32(g + m), vld1q_f32(y + m)));
      }
      for (; m < outputs; ++m) g[m] += y[m];
    }
  }
}

LUTRA_INLINE double sum_of(float32x4_t v) {
  return vaddvq_f64(vaddq_f64(vcvt_f64_f32(vget_low_f32(v)), vcvt_high_f64_f32(v)));
}
LUTRA_INLINE float32x4_t where(uint32x4_t m, float32x4_t v) {
  return vreinterpretq_f32_u32(vandq_u32(m, vreinterpretq_u32_f32(v)));
}

// Cells first..first+7 of a block of whole vectors.
void add_cells(const uint8_t* index, const float* gradient, size_t n, int32_t first, double* cells,
               int64_t* counts) {
  float32x4_t sum[kGradCells];
  uint32x4_t count[kGradCells];
  for (int32_t c = 0; c < kGradCells; ++c) {
    sum[c] = vdupq_n_f32(0.0f);
    count[c] = vdupq_n_u32(0);
  }
  for (size_t i = 0; i < n; i += 4) {
    const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(word_at(index + i)));
    uint32x4_t k = vmovl_u16(vget_low_u16(vmovl_u8(bytes)));
    k = vsubq_u32(k, vdupq_n_u32(static_cast<uint32_t>(first)));
    const float32x4_t g = vld1q_f32(gradient + i);
#pragma GCC unroll 8
    for (int32_t c = 0; c < kGradCells; ++c) {
      const uint32x4_t m = vceqq_u32(k, vdupq_n_u32(static_cast<uint32_t>(c)));
      count[c] = vsubq_u32(count[c], m);
      sum[c] = vaddq_f32(sum[c], where(m, g));
    }
  }
  for (int32_t c = 0; c < kGradCells; ++c) {
    counts[c] += vaddvq_u32(count[c]);
    cells[c] += sum_of(sum[c]);
  }
}

void response_grad(const float* x, const uint8_t* index, float* gradient, size_t n, float low,
                   float high, int32_t levels, double* cells, int64_t* counts, double* inside) {
  const size_t whole = n / 4 * 4;
  const float32x4_t lower = vdupq_n_f32(low), upper = vdupq_n_f32(high);
  for (size_t first = 0; first < whole; first += kGradBlock) {
    const size_t some = whole - first < kGradBlock ? whole - first : kGradBlock;
    for (int32_t k = 0; k < levels; k += kGradCells) {
      double c[kGradCells] = {};
      int64_t t[kGradCells] = {};
      add_cells(index + first, gradient + first, some, k, c, t);
      for (int32_t i = 0; i < kGradCells && k + i < levels; ++i) {
        cells[k + i] += c[i];
        counts[k + i] += t[i];
      }
    }
    float32x4_t sum = vdupq_n_f32(0.0f);
    for (size_t i = first; i < first + some; i += 4) {
      const float32x4_t v = vld1q_f32(x + i);
      const uint32x4_t in = vandq_u32(vcgtq_f32(v, lower), vcltq_f32(v, upper));
      const float32x4_t g = where(in, vld1q_f32(gradient + i));
      sum = vaddq_f32(sum, vmulq_f32(g, where(in, v)));
      vst1q_f32(gradient + i, g);
    }
    *inside += sum_of(sum);
  }
  for (size_t i = whole; i < n; ++i) {
    const float g = gradient[i];
    if (index[i] < levels) {
      cells[index[i]] += static_cast<double>(g);
      ++counts[index[i]];
    }
    const bool in = low < x[i] && x[i] < high;
    *inside += in ? static_cast<double>(g) * static_cast<double>(x[i]) : 0.0;
    gradient[i] = in ? g : 0.0f;
  }
}

}  // namespace
}  // namespace lutra
