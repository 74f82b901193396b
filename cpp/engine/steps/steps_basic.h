// Element-wise, pooling, reduction and shape steps. All are plain float32 code for the baseline
// CPU.
#pragma once

#include "engine/steps/steps_conv.h"

namespace lutra {

StepPtr clamp_step(float low, float high);
StepPtr affine_step(std::vector<float> scale, std::vector<float> bias);
StepPtr mean_step(std::vector<int> axes, bool keepdims);
// Without the batch axis; one size may be -1, what the others leave.
StepPtr reshape_step(std::vector<int64_t> shape);
StepPtr pad_step(std::vector<int64_t> before, std::vector<int64_t> after, float value);
// A stop of -1 is the end of the axis.
StepPtr slice_step(int axis, int64_t start, int64_t stop, int64_t step);
StepPtr concat_step(int axis);

enum class Pool { kMax, kAverage };
// Kernel, stride, padding and dilation of `window`; its channels are not used.
StepPtr pool_step(Pool kind, const ConvGeometry& window, bool ceil_mode, bool count_include_pad);
StepPtr adaptive_pool_step(Pool kind, int64_t out_h, int64_t out_w);

}  // namespace lutra
