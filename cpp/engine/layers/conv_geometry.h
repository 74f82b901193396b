// Sizes of a convolution, and how layers read them from the arguments of their operators.
#pragma once

#include <array>
#include <cstdint>

#include "engine/core/step_args.h"

namespace lutra {

struct ConvGeometry {
  int64_t channels = 1;
  int64_t kernel_h = 1, kernel_w = 1;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_h = 0, pad_w = 0;  // before the first row and column
  int64_t end_h = 0, end_w = 0;  // behind the last ones
  int64_t dilation_h = 1, dilation_w = 1;

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t depth() const { return channels * taps(); }
  bool padded() const { return pad_h || pad_w || end_h || end_w; }
  // Positions of the kernel; 0 where it is larger than the padded image.
  int64_t out_h(int64_t h) const {
    const int64_t room = h + pad_h + end_h - dilation_h * (kernel_h - 1) - 1;
    return room < 0 ? 0 : room / stride_h + 1;
  }
  int64_t out_w(int64_t w) const {
    const int64_t room = w + pad_w + end_w - dilation_w * (kernel_w - 1) - 1;
    return room < 0 ? 0 : room / stride_w + 1;
  }
};

using Pair = std::array<int64_t, 2>;

// `padding` is that of both ends of each axis, or of the two ends of the rows and then of the
// columns. Throws std::invalid_argument unless all sizes are in the limits.
ConvGeometry conv_geometry(int64_t channels, Pair kernel, Pair stride, const Sizes& padding,
                           Pair dilation);
// With the attributes stride, padding and dilation.
ConvGeometry conv_geometry(const StepArgs& args, int64_t channels, Pair kernel);
// Of a layer whose tensors do not tell: in_channels and kernel, or in_features.
ConvGeometry row_geometry(const StepArgs& args, bool linear);

// The attributes act_scale, act_zero and act_bits.
Quantization grid_of(const StepArgs& args);
// A float32 tensor of one value for each output.
const float* per_output(const StepArgs& args, const char* name, int64_t outputs);

}  // namespace lutra
