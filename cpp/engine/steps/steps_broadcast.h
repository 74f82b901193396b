// Arithmetic of two values and with constants, and steps that only move values: transposing and
// repeating.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/core/step.h"

namespace lutra {

enum class Arithmetic { kAdd, kSub, kMul, kDiv };

Arithmetic arithmetic_of(const std::string& name);  // "add", "sub", "mul", "div"
// Of every pair of elements. With `broadcast` an axis of size 1 fits any size, as in NumPy, but the
// ranks are equal; else the shapes are.
StepPtr pair_step(const Kernels& kernels, Arithmetic operation, bool broadcast);
// x * scale + bias
StepPtr affine_scalar_step(const Kernels& kernels, float scale, float bias);
// From int32 to the nearest float32.
StepPtr cast_step();
// numpy.transpose; axes[0] is 0.
StepPtr transpose_step(std::vector<int> axes);
// Sizes behind the batch; 0 keeps what is there, and an axis of size 1 becomes any size.
StepPtr expand_step(std::vector<int64_t> shape);

}  // namespace lutra
