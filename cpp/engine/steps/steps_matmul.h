// Products of two values.
#pragma once

#include "engine/core/step.h"

namespace lutra {

// a (N, ..., M, K), b (N, ..., K, P) -> (N, ..., M, P); the last two axes of either may be swapped,
// and the axes before them are equal or 1. Every sum is an fma chain in the order of k.
StepPtr matmul_step(const Kernels& kernels, bool transpose_a, bool transpose_b);

}  // namespace lutra
