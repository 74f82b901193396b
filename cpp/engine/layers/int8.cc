// A dense convolution or linear layer in int8: u8 activations of at most 7 bits, s8 weights, exact
// int32 sums.
#include "engine/core/limits.h"
#include "engine/layers/gathered.h"
#include "engine/layers/int8_conv.h"
#include "engine/layers/int8_depthwise.h"
#include "kernels/built.h"

namespace lutra {
namespace {

class Int8Layer : public GatheredLayer {
 public:
  // weight (outputs, channels / groups, kernel_h, kernel_w), scale and bias (outputs); `geometry`
  // is that of the whole layer. Throws std::invalid_argument if the sizes do not fit each other.
  Int8Layer(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs, int64_t groups,
            const Quantization& quantization, const int8_t* weight, const float* scale,
            const float* bias);
  size_t parameter_bytes() const override { return group_bytes_ * static_cast<size_t>(groups_); }

 private:
  int32_t narrow_depth() const { return static_cast<int32_t>(depth()); }
  int32_t narrow_outputs() const { return static_cast<int32_t>(group_outputs()); }
  size_t gathered_bytes() const override { return kernels_.gather8_bytes(narrow_depth()); }
  void gather(const Patch& patch, uint8_t* gathered) const override {
    kernels_.gather8(narrow_depth(), static_cast<int32_t>(geometry_.taps()), patch, gathered);
  }
  void multiply(int64_t group, const uint8_t* gathered, int64_t first, int64_t last,
                const Epilogue& e) const override {
    kernels_.dense8(narrow_depth(), narrow_outputs(),
                    weight_.data() + static_cast<size_t>(group) * group_bytes_, gathered,
                    static_cast<int32_t>(first), static_cast<int32_t>(last), e);
  }
  void multiply_row(const uint8_t* x, int64_t first, int64_t last, int32_t* sums) const override {
    kernels_.dense8_row(narrow_depth(), narrow_outputs(), weight_.data(), x,
                        static_cast<int32_t>(first), static_cast<int32_t>(last), sums);
  }
  int64_t largest_sum() const override {
    return 127 * depth() * quantization_.qmax();  // |x - zero| <= qmax
  }

  size_t group_bytes_;  // of packed weights
  AlignedBytes weight_;
};

Int8Layer::Int8Layer(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs,
                     int64_t groups, const Quantization& quantization, const int8_t* weight,
                     const float* scale, const float* bias)
    : GatheredLayer("int8", kernels, geometry, outputs, groups, quantization, kMaxActBits, scale,
                    bias) {
  const int64_t depth = this->depth(), per_group = group_outputs();
  require(depth <= kMaxInt8Depth, "too many inputs for exact 32-bit sums");
  require(are_symmetric(weight, outputs * depth), "a weight is -128; the range is -127..127");
  group_bytes_ = align64(kernels.dense8_bytes(narrow_depth(), narrow_outputs()));
  weight_ = AlignedBytes(group_bytes_ * static_cast<size_t>(groups));
  for (int64_t g = 0; g < groups; ++g) {
    kernels.pack_dense8(narrow_depth(), narrow_outputs(), weight + g * per_group * depth,
                        weight_.data() + static_cast<size_t>(g) * group_bytes_);
  }
  offset_ = zero_offsets(weight, outputs, depth, quantization.zero);
}

std::unique_ptr<Layer> make_int8(const Kernels& kernels, const StepArgs& args, bool linear) {
  const Tensor<int8_t> weight = args.tensor<int8_t>("weight", linear ? 2 : 4);
  const int64_t groups = linear ? 1 : args.integer("groups"), channels = weight[1] * groups;
  const ConvGeometry geometry = linear ? ConvGeometry{.channels = channels}
                                       : conv_geometry(args, channels, {weight[2], weight[3]});
  const float* const scale = per_output(args, "scale", weight[0]);
  const float* const bias = per_output(args, "bias", weight[0]);
  if (is_depthwise(geometry, groups)) {
    return make_int8_depthwise(kernels, geometry, weight[0], grid_of(args), weight.data, scale,
                               bias);
  }
  if (kHaveConv8 && is_quad_conv(kernels, geometry, groups)) {
    return make_int8_conv(kernels, geometry, weight[0], grid_of(args), weight.data, scale, bias);
  }
  return std::make_unique<Int8Layer>(kernels, geometry, weight[0], groups, grid_of(args),
                                     weight.data, scale, bias);
}

}  // namespace

void int8_ops(OpRegistry& r) {
  r.add("int8_conv2d", layer_operator<make_int8, false>());
  r.add("int8_linear", layer_operator<make_int8, true>());
}

}  // namespace lutra
