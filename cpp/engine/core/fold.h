// Integers from integers: where a sum is scaled, shifted, clamped and quantised, and nobody reads
// the floats between, one multiply-add replaces the chain.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/core/quantization.h"
#include "engine/core/step.h"

namespace lutra {

struct Fold {
  std::vector<float> scale, bias;  // by output; a scale of NaN where the chain must be kept
  bool on() const { return !scale.empty(); }
};

// Finds scale' and bias' so that
//   clamp(round_half_even(fma(float32(n), scale', bias')) + zero, 0, qmax)
// equals the grid value of function(clamp(float32(n) * scale + bias)) for every integer
// |n| <= limit, which is checked around each place where the result changes. The function, or null,
// takes outputs for channels. Empty if no output has such, or, with a function, not all of them.
Fold fold_quantization(const std::vector<float>& scale, const std::vector<float>& bias, Clamp clamp,
                       const Elementwise* function, const Grid& grid, int64_t limit);

}  // namespace lutra
