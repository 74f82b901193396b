// What training needs of tables and lookup layers. Private to scalar.cc and wasm.cc.
#pragma once

#include "kernels.h"

namespace lutra {
namespace {

void table_grad(const uint8_t* codes, size_t code_stride, int32_t codebooks, int32_t centroids,
                const float* rows, int32_t count, int32_t outputs, float* grad) {
  for (int32_t r = 0; r < count; ++r) {
    for (int32_t b = 0; b < codebooks; ++b) {
      float* g = grad + (static_cast<size_t>(b) * centroids + codes[b * code_stride + r]) * outputs;
      for (int32_t m = 0; m < outputs; ++m) g[m] += rows[static_cast<size_t>(r) * outputs + m];
    }
  }
}

void response_grad(const float* x, const uint8_t* index, float* gradient, size_t n, float low,
                   float high, int32_t levels, double* cells, int64_t* counts, double* inside) {
  for (size_t i = 0; i < n; ++i) {
    const float g = gradient[i];
    if (index[i] < levels) {
      cells[index[i]] += static_cast<double>(g);
      ++counts[index[i]];
    }
    if (low < x[i] && x[i] < high) {
      *inside += static_cast<double>(g) * static_cast<double>(x[i]);
    } else {
      gradient[i] = 0.0f;
    }
  }
}

}  // namespace
}  // namespace lutra
