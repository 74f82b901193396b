// Activation grids, and what follows a sum: clamp, and quantisation for the readers of a value.
#pragma once

#include <cstdint>
#include <vector>

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

// Whether int8 weights are in -127..127.
bool are_symmetric(const int8_t* weight, int64_t count);
// What is added to the sums of products of weights (outputs, depth) with integers of a grid, so
// that its zero point counts as 0: -zero times the sum of an output's weights.
std::vector<int32_t> zero_offsets(const int8_t* weight, int64_t outputs, int64_t depth,
                                  int32_t zero);

struct Clamp {
  bool on = false;
  float low = 0.0f, high = 0.0f;
};

}  // namespace lutra
