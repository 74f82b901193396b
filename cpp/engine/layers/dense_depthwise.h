// A depthwise convolution in float32: every output comes from one channel.
#pragma once

#include "engine/core/step.h"
#include "engine/core/step_args.h"
#include "engine/layers/depthwise_planes.h"

namespace lutra {

// For is_depthwise(geometry, channels): weight (outputs, 1, kernel_h, kernel_w), bias (outputs).
// Throws std::invalid_argument if the sizes do not fit each other.
StepPtr make_depthwise(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs,
                       const float* weight, const float* bias, const StepArgs& args);

}  // namespace lutra
