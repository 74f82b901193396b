// A convolution or linear layer whose products are entries of one table, read at the index of an
// activation and the index of a weight; exact int32 sums, bound to one instruction set.
#pragma once

#include "engine/layers/gathered.h"

namespace lutra {

class LookupLayer : public GatheredLayer {
 public:
  // table (2^bits, weights), entries -127..127, zero for activations of zero; weight (outputs,
  // channels, kernel_h, kernel_w): indices 0..weights-1; scale and bias (outputs). Throws
  // std::invalid_argument, saying what is wrong, if they do not fit each other.
  LookupLayer(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs,
              const Quantization& quantization, int64_t weights, const int8_t* table,
              const uint8_t* weight, const float* scale, const float* bias);
  size_t parameter_bytes() const override { return kernels_.response_bytes(shape_); }

 private:
  size_t gathered_bytes() const override { return kernels_.index_bytes(shape_); }
  void gather(const Patch& patch, uint8_t* gathered) const override;
  void multiply(int64_t group, const uint8_t* gathered, int64_t first, int64_t last,
                const Epilogue& e) const override;
  void multiply_row(const uint8_t* x, int64_t first, int64_t last, int32_t* sums) const override;
  int64_t largest_sum() const override { return 127 * depth(); }

  LookupShape shape_;
  AlignedBytes packed_;
};

}  // namespace lutra
