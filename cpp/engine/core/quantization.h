// Activation grids, and what follows a sum: clamp, and quantisation for the readers of a value.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace lutra {

struct Quantization {
  float scale = 1.0f;
  int32_t zero = 0;
  int32_t bits = 7;
  int32_t qmax() const { return (1 << bits) - 1; }
  bool operator==(const Quantization&) const = default;
};

// The grid of the kernels. Its `inverse` is set if multiplying by it gives the same integers as
// dividing by `scale`, which is checked here around every boundary between two integers.
Grid make_grid(const Quantization& q);

struct Clamp {
  bool on = false;
  float low = 0.0f, high = 0.0f;
};

}  // namespace lutra
