// Functions of each value alone, one behind the other, and those that most networks have.
#pragma once

#include <algorithm>
#include <vector>

#include "engine/core/step.h"
#include "kernels/kernels.h"

namespace lutra {

// The first function, or null, and then the next one. Simple ones become one pass.
ElementwisePtr in_order(ElementwisePtr first, ElementwisePtr next);

// See BendKind. Scales and biases are one number each, or one for each channel.
ElementwisePtr limits(const Kernels& kernels, float low, float high);
ElementwisePtr affine(const Kernels& kernels, std::vector<float> scale, std::vector<float> bias);
ElementwisePtr hardswish(const Kernels& kernels);
ElementwisePtr leaky_relu(const Kernels& kernels, float slope);

// y[i] = f(x[i], i), where y may be x: in chunks that do not overlap, so that the compiler can make
// vector code.
template <class F>
void in_chunks(const float* x, size_t n, float* y, const F& f) {
  constexpr size_t kChunk = 16;
  float made[kChunk];
  size_t i = 0;
  for (; i + kChunk <= n; i += kChunk) {
    for (size_t k = 0; k < kChunk; ++k) made[k] = f(x[i + k], i + k);
    std::copy(made, made + kChunk, y + i);
  }
  for (; i < n; ++i) y[i] = f(x[i], i);
}

}  // namespace lutra
