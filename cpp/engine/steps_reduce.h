// Reductions over whole axes.
#pragma once

#include "step.h"

namespace lutra {

// The largest value over the axes (none of them 0). NaN is passed over; where all are NaN the
// result is minus infinity.
StepPtr max_step(const std::vector<int>& axes, bool keepdims);

}  // namespace lutra
