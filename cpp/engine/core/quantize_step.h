// From floats to a grid, for a value whose maker cannot do it.
#pragma once

#include "engine/core/step.h"

namespace lutra {

StepPtr quantize_step(const Kernels& kernels);

}  // namespace lutra
