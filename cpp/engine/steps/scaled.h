// How much larger an operator makes images: attributes that operators share.
#pragma once

#include <string>

#include "engine/core/limits.h"
#include "engine/core/step_args.h"

namespace lutra {

// Throws std::invalid_argument unless there is one of these: a size (height, width), two scales
// above 0 and at most kMaxFactor, or a second input.
inline void check_scaled(const StepArgs& args) {
  const double high = args.number("scale_h"), wide = args.number("scale_w");
  const size_t sizes = args.integers("size").size();
  const bool scaled = high != 0.0 || wide != 0.0;
  require((sizes == 2) + scaled + (args.inputs.size() == 2) == 1 && (sizes == 0 || sizes == 2),
          "% needs a size, two scales or a second input, and only one of them", args.op);
  require(!scaled || (high > 0.0 && high <= kMaxFactor && wide > 0.0 && wide <= kMaxFactor),
          "% needs two scales above 0 and at most %", args.op, kMaxFactor);
  // Smaller ones leave nothing of any image, and have no inverse in float32.
  require(!scaled || (high >= 1e-12 && wide >= 1e-12), "% needs larger scales", args.op);
}

}  // namespace lutra
