// Functions of one variable and piecewise-linear tables of them.
#pragma once

#include <vector>

#include "engine/core/step.h"

namespace lutra {

StepPtr function_step(const Kernels& kernels, Function function);
// The arrays of `table` are copied.
StepPtr piecewise_step(const Kernels& kernels, const Piecewise& table);

}  // namespace lutra
