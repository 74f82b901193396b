// Steps that give images another size.
#pragma once

#include "step.h"

namespace lutra {

StepPtr pixel_shuffle_step(int64_t factor);

}  // namespace lutra
