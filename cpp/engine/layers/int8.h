// A dense convolution or linear layer in int8: u8 activations of at most 7 bits, s8 weights, exact
// int32 sums, bound to one instruction set.
#pragma once

#include "engine/layers/gathered.h"

namespace lutra {

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
  size_t gathered_bytes() const override;
  void gather(const Patch& patch, uint8_t* gathered) const override;
  void multiply(int64_t group, const uint8_t* gathered, int64_t first, int64_t last,
                const Epilogue& e) const override;
  void multiply_row(const uint8_t* x, int64_t first, int64_t last, int32_t* sums) const override;
  int64_t largest_sum() const override;

  size_t group_bytes_;  // of packed weights
  AlignedBytes weight_;
};

}  // namespace lutra
