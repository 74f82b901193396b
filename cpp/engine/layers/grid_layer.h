// A layer whose codes are its activations on the grid: dense int8 and lookup layers.
#pragma once

#include <string>

#include "engine/layers/layer.h"

namespace lutra {

class GridLayer : public Layer {
 public:
  using Layer::run;
  // Codes: the activations on the grid, laid out like x.
  void run(const ImageView& x, const LayerOutput& output, uint8_t* codes, uint8_t* workspace,
           ThreadPool& pool) const override;
  void check_codes(const ImageView& x, int64_t rows, const Codes& codes) const override;

 protected:
  // As Layer, in groups of channels and outputs.
  GridLayer(std::string name, const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs,
            int64_t groups, const Quantization& quantization, int most_bits, const float* scale,
            const float* bias);

  int64_t depth() const { return geometry_.depth() / groups_; }  // of a group
  int64_t group_outputs() const { return outputs_ / groups_; }

  int64_t groups_;
};

}  // namespace lutra
