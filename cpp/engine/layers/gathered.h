// A layer that reads all activations of a row at once: what dense int8 and lookup layers share. Few
// rows of a linear layer run by themselves, without tiles.
#pragma once

#include <string>

#include "engine/layers/layer.h"

namespace lutra {

class GatheredLayer : public Layer {
 public:
  using Layer::run;
  // Codes: the activations on the grid, laid out like x.
  void run(const ImageView& x, const LayerOutput& output, uint8_t* codes, uint8_t* workspace,
           ThreadPool& pool) const override;
  void check_codes(const ImageView& x, int64_t rows, const Codes& codes) const override;
  std::string method(int64_t rows) const override {
    return by_row(rows) ? name_ + ", rows" : name_;
  }

 protected:
  // As Layer, in groups of channels and outputs.
  GatheredLayer(std::string name, const Kernels& kernels, const ConvGeometry& geometry,
                int64_t outputs, int64_t groups, const Quantization& quantization, int most_bits,
                const float* scale, const float* bias);

  int64_t depth() const { return geometry_.depth() / groups_; }  // of a group
  int64_t group_outputs() const { return outputs_ / groups_; }

  // The kernels, for a tile of one group.
  virtual size_t gathered_bytes() const = 0;
  virtual void gather(const Patch& patch, uint8_t* gathered) const = 0;
  virtual void multiply(int64_t group, const uint8_t* gathered, int64_t first, int64_t last,
                        const Epilogue& e) const = 0;
  // One row of a layer without groups. x is padded with zeros to a multiple of 64 bytes.
  virtual void multiply_row(const uint8_t* x, int64_t first, int64_t last, int32_t* sums) const = 0;

  int64_t groups_;

 private:
  struct Sizes;
  bool by_row(int64_t rows) const { return groups_ == 1 && geometry_.taps() == 1 && rows <= 4; }
  Memory memory(const PatchSource& source, int threads, bool direct) const override;
  void run_loaded(const Call& call) const override;
  void run_rows(const Call& call, size_t stride) const;
};

}  // namespace lutra
