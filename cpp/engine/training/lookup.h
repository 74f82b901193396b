// What training needs beside the forward pass of a lookup layer.
#pragma once

#include <array>
#include <cstdint>

#include "engine/core/thread_pool.h"
#include "kernels/kernels.h"

namespace lutra {

struct LookupGradient {
  std::array<double, 256> cells{};    // sum of the gradient, by activation index
  std::array<int64_t, 256> counts{};  // activations, by index
  double inside = 0.0;                // sum of gradient * x where low < x < high
};

// From the gradient of looked-up activations, which becomes zero where not low < x < high. All
// arrays have `count` elements; indices of `levels` and more are not counted. The chunks and the
// order of their sums are fixed: the result does not depend on the number of threads.
LookupGradient lookup_gradient(const Kernels& kernels, const float* x, const uint8_t* indices,
                               float* gradient, int64_t count, float low, float high,
                               int32_t levels, ThreadPool& pool);

}  // namespace lutra
