#include "engine/layers/conv_geometry.h"

#include "engine/core/limits.h"

namespace lutra {

ConvGeometry conv_geometry(int64_t channels, Pair kernel, Pair stride, const Sizes& padding,
                           Pair dilation) {
  require(padding.size() == 2 || padding.size() == 4, "padding needs two or four integers, not %",
          padding.size());
  const bool ends = padding.size() == 4;
  const std::string most = " and at most " + std::to_string(kMaxExtent);
  for (const Pair& pair : {kernel, stride, dilation}) {
    for (const int64_t v : pair) {
      require(v >= 1 && v <= kMaxExtent, "kernel, stride and dilation must be at least 1%, not %",
              most, v);
    }
  }
  for (const int64_t v : padding) {
    require(v >= 0 && v <= kMaxExtent, "padding must not be negative%, not %", most, v);
  }
  return {.channels = channels,
          .kernel_h = kernel[0],
          .kernel_w = kernel[1],
          .stride_h = stride[0],
          .stride_w = stride[1],
          .pad_h = padding[0],
          .pad_w = padding[ends ? 2 : 1],
          .end_h = padding[ends ? 1 : 0],
          .end_w = padding[ends ? 3 : 1],
          .dilation_h = dilation[0],
          .dilation_w = dilation[1]};
}

ConvGeometry conv_geometry(const StepArgs& args, int64_t channels, Pair kernel) {
  return conv_geometry(channels, kernel, args.pair("stride"), args.integers("padding"),
                       args.pair("dilation"));
}

ConvGeometry row_geometry(const StepArgs& args, bool linear) {
  if (linear) return {.channels = args.integer("in_features")};
  return conv_geometry(args, args.integer("in_channels"), args.pair("kernel"));
}

Quantization grid_of(const StepArgs& args) {
  return {args.float32("act_scale"), args.int32("act_zero"), args.int32("act_bits")};
}

const float* per_output(const StepArgs& args, const char* name, int64_t outputs) {
  const Tensor<float> values = args.tensor<float>(name, 1);
  require(values[0] == outputs, "% needs one value per output, %, not %", name, outputs, values[0]);
  return values.data;
}

}  // namespace lutra
