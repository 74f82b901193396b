// Norms, softmax and attention.
#pragma once

#include "engine/steps/function_tables.h"

namespace lutra {

// Over the last axis, of the length of `weight`. A mean is taken off only with `center`; `bias` may
// be empty.
StepPtr norm_step(const Kernels& kernels, bool center, std::vector<float> weight,
                  std::vector<float> bias, float eps, LineTable rsqrt);
StepPtr softmax_step(const Kernels& kernels, int axis, LineTable exp, LineTable reciprocal);

// softmax(scale q k^T) v of every head; inputs q (N, T, D), k (N, S, D), v (N, S, D) and perhaps
// a mask (N, S) of integers.
struct AttentionSettings {
  int64_t heads;
  float scale;
  bool causal;
  int64_t offset[3];  // the first feature of q, k and v that is read
  int64_t width;      // how many are; -1: all of q
  LineTable exp, reciprocal;
};
StepPtr attention_step(const Kernels& kernels, AttentionSettings settings);

}  // namespace lutra
