// Piecewise-linear functions, norms, softmax and attention: what kernels.h says, one value at a
// time. Private to scalar.cc.
#pragma once

#include "functions.h"

namespace lutra {
namespace {

void quantize(const float* x, size_t n, const Grid& grid, uint8_t* q);

void piecewise(const Piecewise& p, const float* x, size_t n, float* y) {
  const int32_t last = p.entries - 1;
  for (size_t i = 0; i < n; ++i) {
    int32_t e = 0;
    for (int32_t b = 0; b < last; ++b) e += x[i] >= p.breakpoint[b] ? 1 : 0;
    float v = x[i];
    if (p.slope[0] == 0.0f && v < -kLargest) v = -kLargest;
    if (p.slope[last] == 0.0f && v > kLargest) v = kLargest;
    y[i] = std::fmaf(p.slope[e], v, p.intercept[e]);
  }
}

float power_of(float x, const Segments& table) {
  if (table.entries == 0) return exp_of_score(x);
  float y;
  table_exp(table, &x, 1, &y);
  return y;
}

float inverse_of(float x, const Segments& table) {
  if (table.entries == 0) return 1.0f / x;
  float y;
  table_reciprocal(table, &x, 1, &y);
  return y;
}

float inverse_root_of(float x, const Segments& table) {
  if (table.entries == 0) return 1.0f / std::sqrt(x);
  float y;
  table_rsqrt(table, &x, 1, &y);
  return y;
}

void put(float y, const PlaneOutput& to, size_t plane, size_t row) {
  if (to.out) to.out[plane * to.stride + row] = y;
  for (int32_t i = 0; i < to.quantized; ++i) {
    quantize(&y, 1, to.q[i].grid, to.q[i].out + plane * to.q[i].stride + row);
  }
}

void norm(const Norm& n, const float* x, size_t stride, size_t rows, const PlaneOutput& to) {
  const float width = static_cast<float>(n.width);
  const auto total = [](const float* s) { return (s[0] + s[1]) + (s[2] + s[3]); };
  for (size_t r = 0; r < rows; ++r) {
    float sums[4] = {}, squares[4] = {};
    for (int32_t d = 0; d < n.width; ++d) sums[d % 4] += x[d * stride + r];
    const float mean = n.center ? total(sums) / width : 0.0f;
    for (int32_t d = 0; d < n.width; ++d) {
      const float c = x[d * stride + r] - mean;
      squares[d % 4] = std::fmaf(c, c, squares[d % 4]);
    }
    const float factor = inverse_root_of(total(squares) / width + n.eps, n.rsqrt);
    for (int32_t d = 0; d < n.width; ++d) {
      const float c = (x[d * stride + r] - mean) * factor;
      put(std::fmaf(c, n.weight[d], n.bias ? n.bias[d] : 0.0f), to, static_cast<size_t>(d), r);
    }
  }
}

void softmax(const Softmax& s, const float* x, size_t stride, size_t rows, float* y) {
  for (size_t r = 0; r < rows; ++r) {
    float top = -INFINITY, sum = 0.0f;
    for (int32_t j = 0; j < s.count; ++j) top = maximum(x[j * stride + r], top);
    for (int32_t j = 0; j < s.count; ++j) {
      const float p = power_of(x[j * stride + r] - top, s.exp);
      y[j * stride + r] = p;
      sum += p;
    }
    const float factor = inverse_of(sum, s.reciprocal);
    for (int32_t j = 0; j < s.count; ++j) y[j * stride + r] *= factor;
  }
}

size_t attention_bytes(int32_t, int32_t keys) { return static_cast<size_t>(keys) * sizeof(float); }

size_t attention_row_bytes(int32_t width, int32_t keys) { return attention_bytes(width, keys); }

void attention(const Attention& a, int32_t first, int32_t last, const PlaneOutput& to,
               uint8_t* scratch) {
  float* const p = reinterpret_cast<float*>(scratch);
  for (int32_t i = first; i < last; ++i) {
    const int32_t end = a.causal && i + a.past + 1 < a.keys ? i + a.past + 1 : a.keys;
    const auto seen = [&](int32_t j) { return !a.mask || a.mask[j] != 0; };
    float top = -INFINITY, sum = 0.0f;
    for (int32_t j = 0; j < end; ++j) {
      if (!seen(j)) continue;
      p[j] = 0.0f;
      for (int32_t d = 0; d < a.width; ++d) {
        p[j] = std::fmaf(a.q[d * a.q_stride + i] * a.scale, a.k[d * a.k_stride + j], p[j]);
      }
      top = maximum(p[j], top);
    }
    if (top == -INFINITY) top = 0.0f;
    for (int32_t j = 0; j < end; ++j) {
      if (seen(j)) sum += p[j] = power_of(p[j] - top, a.exp);
    }
    const float factor = sum <= 0.0f ? 0.0f : inverse_of(sum, a.reciprocal);
    for (int32_t d = 0; d < a.width; ++d) {
      float y = 0.0f;
      for (int32_t j = 0; j < end; ++j) {
        if (seen(j)) y = std::fmaf(p[j], a.v[d * a.v_stride + j * a.v_step], y);
      }
      put(y * factor, to, static_cast<size_t>(d), static_cast<size_t>(i));
    }
  }
}

void attention_row(const Attention& a, int32_t query, const PlaneOutput& to, uint8_t* scratch) {
  attention(a, query, query + 1, to, scratch);
}

}  // namespace
}  // namespace lutra
