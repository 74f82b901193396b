// A dense convolution or linear layer in int8: u8 activations of at most 7 bits, s8 weights, exact
// int32 sums, bound to one instruction set.
#pragma once

#include <vector>

#include "memory.h"
#include "patch_source.h"
#include "tile_output.h"

namespace lutra {

class Int8Layer {
 public:
  // weight (outputs, channels / groups, kernel_h, kernel_w), scale and bias (outputs); `geometry`
  // is that of the whole layer. Throws std::invalid_argument if the sizes do not fit each other.
  Int8Layer(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs, int64_t groups,
            const Quantization& quantization, const int8_t* weight, const float* scale,
            const float* bias);

  const ConvGeometry& geometry() const { return geometry_; }
  const Quantization& quantization() const { return quantization_; }
  int64_t outputs() const { return outputs_; }
  size_t workspace_bytes(int64_t n, int64_t h, int64_t w, int threads, bool direct) const;
  void run(const ByteView& x, const LayerOutput& output, uint8_t* workspace,
           ThreadPool& pool) const;
  size_t parameter_bytes() const { return group_bytes_ * static_cast<size_t>(groups_); }
  // For outputs that are only read on this grid.
  Fold fold(Clamp clamp, const Quantization& grid) const;
  const char* method(int64_t rows) const { return by_row(rows) ? "int8, rows" : "int8"; }

 private:
  struct Sizes;
  bool by_row(int64_t rows) const { return groups_ == 1 && geometry_.taps() == 1 && rows <= 4; }
  void run_rows(const PatchSource& source, const TileOutput& output, uint8_t* workers,
                size_t stride, ThreadPool& pool) const;

  const Kernels& kernels_;
  ConvGeometry geometry_;
  int64_t outputs_, groups_;
  Quantization quantization_;
  size_t group_bytes_;  // of packed weights
  AlignedBytes weight_;
  std::vector<int32_t> offset_;  // -zero times the sum of the weights
  std::vector<float> scale_, bias_;
};

}  // namespace lutra
