// Tables of functions that steps own, in the form that kernels read.
#pragma once

#include <vector>

#include "engine/core/step.h"

namespace lutra {

// Slopes and intercepts of 8, 16 or 32 lines; or none: the function itself.
struct LineTable {
  std::vector<float> slope, intercept;

  bool empty() const { return slope.empty(); }
  size_t bytes() const { return (slope.size() + intercept.size()) * sizeof(float); }
  Segments segments() const {
    return {.entries = static_cast<int32_t>(slope.size()),
            .slope = slope.data(),
            .intercept = intercept.data()};
  }
};

}  // namespace lutra
