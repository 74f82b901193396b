// WebAssembly: attention, query by query, in little code. Private to wasm.cc, after planes.h.
//
// Scores have keys in the lanes, results features. Multiply-adds take so long here (wasm_fma.h)
// that loads and loops around them do not count.
#pragma once

#include "planes.h"

namespace lutra {
namespace {

size_t attention_bytes(int32_t, int32_t keys) {
  return static_cast<size_t>(round_up(keys, kLanes)) * sizeof(float);
}
size_t attention_row_bytes(int32_t width, int32_t keys) { return attention_bytes(width, keys); }

// Features d..d+3 of a query, those that there are: chains over the keys that it sees.
Floats weigh_values(const Attention& a, const float* p, int32_t end, int32_t d, int32_t count) {
  Floats y = splat(0.0f);
  for (int32_t j = 0; j < end; ++j) {
    if (a.mask && a.mask[j] == 0) continue;
    alignas(16) float v[kLanes] = {};
    for (int32_t i = 0; i < count; ++i) {
      v[i] = a.v[static_cast<size_t>(d + i) * a.v_stride + j * a.v_step];
    }
    y = fmadd(splat(p[j]), load_floats(v), y);
  }
  return y;
}

void attention(const Attention& a, int32_t first, int32_t last, const PlaneOutput& to,
               uint8_t* scratch) {
  float* const p = reinterpret_cast<float*>(scratch);
  for (int32_t i = first; i < last; ++i) {
    const int32_t end = a.causal && i + a.past + 1 < a.keys ? i + a.past + 1 : a.keys;
    const auto seen = [&](int32_t j) { return !a.mask || a.mask[j] != 0; };
    float top = -__builtin_inff(), sum = 0.0f;
    for (int32_t j = 0; j < end; j += kLanes) {
      Floats s = splat(0.0f);
      for (int32_t d = 0; d < a.width; ++d) {
        const Floats q = splat(a.q[d * a.q_stride + i] * a.scale);
        s = fmadd(q, load_floats(a.k + d * a.k_stride + j, end - j), s);
      }
      store_floats(p + j, s);
    }
    for (int32_t j = 0; j < end; ++j) {
      if (seen(j) && p[j] > top) top = p[j];
    }
    if (top == -__builtin_inff()) top = 0.0f;
    for (int32_t j = 0; j < end; j += kLanes) {
      store_floats(p + j, exp_of_score(a.exp, sub(load_floats(p + j), splat(top))));
    }
    for (int32_t j = 0; j < end; ++j) {
      if (seen(j)) sum += p[j];
    }
    alignas(16) float factor[kLanes] = {sum, sum, sum, sum};
    invert(a.reciprocal, factor, kLanes);
    if (sum <= 0.0f) factor[0] = 0.0f;
    for (int32_t d = 0; d < a.width; d += kLanes) {
      const int32_t count = a.width - d < kLanes ? a.width - d : kLanes;
      alignas(16) float y[kLanes];
      store_floats(y, mul(weigh_values(a, p, end, d, count), splat(factor[0])));
      for (int32_t k = 0; k < count; ++k) {
        const size_t row = static_cast<size_t>(i);
        const PlaneWriter writer{to, row, 1, y + k};
        *writer.place(d + k) = y[k];
        writer.done(d + k, y + k);
      }
    }
  }
}

void attention_row(const Attention& a, int32_t query, const PlaneOutput& to, uint8_t* scratch) {
  attention(a, query, query + 1, to, scratch);
}

}  // namespace
}  // namespace lutra
