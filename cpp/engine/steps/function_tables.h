// Functions of one variable: their names, and tables of them in the form that kernels read.
#pragma once

#include <string>
#include <vector>

#include "engine/core/step_args.h"

namespace lutra {

// Throws std::invalid_argument with the list of functions if there is none of that name.
Function function_named(const std::string& name);

// Tables of what the caller owns. They throw std::invalid_argument, in the name of `what`, unless
// the lengths fit and the breakpoints ascend.
Segments checked_segments(const char* what, const Tensor<float>& slope,
                          const Tensor<float>& intercept);
Piecewise checked_piecewise(const Tensor<float>& breakpoint, const Tensor<float>& slope,
                            const Tensor<float>& intercept);

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

// The tensors <function>_slope and <function>_intercept; an empty table without them.
LineTable line_table(const StepArgs& args, const std::string& function);
// Of exp and reciprocal, which are both tables, or neither is.
struct ExpTables {
  LineTable exp, reciprocal;
};
ExpTables exp_tables(const StepArgs& args);

}  // namespace lutra
