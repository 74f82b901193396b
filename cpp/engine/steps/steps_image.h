// Steps that give images another size.
#pragma once

#include "engine/core/step.h"

namespace lutra {

StepPtr pixel_shuffle_step(int64_t factor);

enum class Upsample { kNearest, kNearestExact, kBilinear };
// "nearest", "nearest-exact" or "bilinear"; throws std::invalid_argument.
Upsample upsample_mode(const std::string& name);

// The size of the output is given, or by scales, or it is that of the second input.
struct Upsampling {
  Upsample mode;
  int64_t height = 0, width = 0;        // 0: not given
  double scale_h = 0.0, scale_w = 0.0;  // 0: not given
  bool align_corners = false;
  bool like = false;
};
StepPtr upsample_step(const Upsampling& settings);

}  // namespace lutra
