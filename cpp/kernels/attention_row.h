// Attention of one query in one head. Included by avx2.cc and avx512.cc after attention.h, in the
// anonymous namespace of each.
//
// Lanes are keys for the scores: keys lie in planes, so that neighbouring keys of a feature are
// loaded at once. Lanes are features for the result: values lie in rows. Every score is a chain of
// fused multiply-adds over features and every result one over keys, and powers are added up key by
// key, as in attention.h: the bits are the same.
#pragma once

#include "attention.h"

namespace lutra {
namespace {

constexpr int32_t kRowVectors = 4;  // registers of keys, or of features, side by side

int32_t whole_vectors(int32_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

size_t attention_row_bytes(int32_t width, int32_t keys) {
  return static_cast<size_t>(2 * whole_vectors(width) + whole_vectors(keys)) * sizeof(float);
}

// y[l] = chain over i < n of x[i] * row[i][l], for kVectors registers of lanes, of which `count`
// exist; `step` floats from one row to the next.
template <int kVectors, bool kWhole>
LUTRA_INLINE void chains(const float* x, int32_t n, const float* row, size_t step, int32_t count,
                         float* y) {
  Floats sum[kVectors];
#pragma GCC unroll 4
  for (int32_t v = 0; v < kVectors; ++v) sum[v] = splat(0.0f);
  const RowVectors<kVectors, kWhole> lanes{count};
  for (int32_t i = 0; i < n; ++i, row += step) {
    const Floats one = splat(x[i]);
#pragma GCC unroll 4
    for (int32_t v = 0; v < kVectors; ++v) sum[v] = fmadd(one, lanes.load(row, v), sum[v]);
  }
#pragma GCC unroll 4
  for (int32_t v = 0; v < kVectors; ++v) lanes.store(y, v, sum[v]);
}

void all_chains(const float* x, int32_t n, const float* row, size_t step, int32_t count, float* y) {
  int32_t l = 0;
  for (; l + kRowVectors * kLanes <= count; l += kRowVectors * kLanes) {
    chains<kRowVectors, true>(x, n, row + l, step, kRowVectors * kLanes, y + l);
  }
  for (; l + kLanes <= count; l += kLanes) chains<1, true>(x, n, row + l, step, kLanes, y + l);
  if (l < count) chains<1, false>(x, n, row + l, step, count - l, y + l);
}

void attention_row(const Attention& a, int32_t query, const PlaneOutput& out, uint8_t* memory) {
  float* const q = reinterpret_cast<float*>(memory);
  float* const y = q + whole_vectors(a.width);
  float* const p = y + whole_vectors(a.width);
  const int32_t seen = query + a.past + 1;
  const int32_t keys = a.causal && seen < a.keys ? seen : a.keys;
  for (int32_t d = 0; d < a.width; ++d) q[d] = a.q[d * a.q_stride + query] * a.scale;
  all_chains(q, a.width, a.k, a.k_stride, keys, p);
  Floats tops = splat(-__builtin_inff());
  int32_t j = 0;
  for (; j + kLanes <= keys; j += kLanes) tops = maximum(load_floats(p + j), tops);
  float lane[kLanes];
  store_floats(lane, tops);
  float top = -__builtin_inff();
  for (int32_t l = 0; l < kLanes; ++l) top = lane[l] > top ? lane[l] : top;
  for (; j < keys; ++j) top = p[j] > top ? p[j] : top;
  if (top < -kLargest) top = 0.0f;
  with_exp(a.exp, [&](const auto& exp) {
    const Floats tops = splat(top);
    int32_t i = 0;
    for (; i + kSideBySide * kLanes <= keys; i += kSideBySide * kLanes) {
      Many<Floats, kSideBySide> x;
#pragma GCC unroll 4
      for (int32_t v = 0; v < kSideBySide; ++v) {
        x.v[v] = sub(load_floats(p + i + v * kLanes), tops);
      }
      x = exp(x);
#pragma GCC unroll 4
      for (int32_t v = 0; v < kSideBySide; ++v) store_floats(p + i + v * kLanes, x.v[v]);
    }
    for (; i < keys; i += kLanes) {
      const int32_t count = keys - i < kLanes ? keys - i : kLanes;
      store_floats(p + i, exp(Floats(sub(load_floats(p + i, count), tops))), count);
    }
  });
  float sum = 0.0f;
  for (j = 0; j < keys; ++j) sum += p[j];
  float factors[kLanes];
  store_floats(factors, splat(sum));
  invert(a.reciprocal, factors, kLanes);
  const float factor = sum <= 0.0f ? 0.0f : factors[0];
  all_chains(p, keys, a.v, a.v_step, a.width, y);
  for (int32_t d = 0; d < a.width; ++d) y[d] *= factor;
  const size_t row = static_cast<size_t>(query);
  if (out.out) {
    for (int32_t d = 0; d < a.width; ++d) out.out[d * out.stride + row] = y[d];
  }
  for (int32_t i = 0; i < out.quantized; ++i) {
    uint8_t* const to = out.q[i].out + row;
    if (out.q[i].stride == 1) {
      quantize(y, static_cast<size_t>(a.width), out.q[i].grid, to);
      continue;
    }
    for (int32_t d = 0; d < a.width; ++d)
      quantize(y + d, 1, out.q[i].grid, to + d * out.q[i].stride);
  }
}

}  // namespace
}  // namespace lutra
