// Reductions over whole axes.
#pragma once

#include "engine/core/step.h"

namespace lutra {

// The largest value over the axes (none of them 0). NaN is passed over; where all are NaN the
// result is minus infinity.
StepPtr max_step(const std::vector<int>& axes, bool keepdims);
// The square root of the sum of the squares over the axes (none of them 0).
StepPtr l2_norm_step(const std::vector<int>& axes, bool keepdims);

}  // namespace lutra
