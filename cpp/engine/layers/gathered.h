// A layer that reads all activations of a row at once: what dense int8 and lookup layers share.
//
// quantised planes -> per tile of rows: gather, multiply, write. A linear layer is a 1x1
// convolution over N "images" of one pixel. Few rows of it run by themselves, without tiles.
#pragma once

#include <string>
#include <vector>

#include "engine/core/memory.h"
#include "engine/layers/layer.h"
#include "engine/layers/patch_source.h"

namespace lutra {

class GatheredLayer : public Layer {
 public:
  const ConvGeometry& geometry() const override { return geometry_; }
  const Quantization& quantization() const override { return quantization_; }
  int64_t outputs() const override { return outputs_; }
  size_t workspace_bytes(int64_t n, int64_t h, int64_t w, int threads, bool direct) const override;
  void run(const ByteView& x, const LayerOutput& output, uint8_t* workspace,
           ThreadPool& pool) const override;
  // Codes: the activations on the grid, laid out like x.
  void run(const ImageView& x, const LayerOutput& output, uint8_t* codes, uint8_t* workspace,
           ThreadPool& pool) const override;
  void check_codes(const ImageView& x, int64_t rows, const Codes& codes) const override;
  Fold fold(Clamp clamp, const Quantization& grid) const override;
  std::string method(int64_t rows) const override {
    return by_row(rows) ? name_ + ", rows" : name_;
  }

 protected:
  // scale and bias (outputs); throws std::invalid_argument, in the layer's name, unless the groups,
  // the grid and 1..most_bits activation bits fit. The rest of the layer is the subclass's to
  // check.
  GatheredLayer(std::string name, const Kernels& kernels, const ConvGeometry& geometry,
                int64_t outputs, int64_t groups, const Quantization& quantization, int most_bits,
                const float* scale, const float* bias);
  void require(bool ok, const std::string& what) const;  // "<name> layer: <what>"

  int64_t depth() const { return geometry_.depth() / groups_; }  // of a group
  int64_t group_outputs() const { return outputs_ / groups_; }

  // The kernels, for a tile of one group.
  virtual size_t gathered_bytes() const = 0;
  virtual void gather(const Patch& patch, uint8_t* gathered) const = 0;
  virtual void multiply(int64_t group, const uint8_t* gathered, int64_t first, int64_t last,
                        const Epilogue& e) const = 0;
  // One row of a layer without groups. x is padded with zeros to a multiple of 64 bytes.
  virtual void multiply_row(const uint8_t* x, int64_t first, int64_t last, int32_t* sums) const = 0;
  // Whatever the activations are, no sum with its offset is larger or smaller than this.
  virtual int64_t largest_sum() const = 0;

  const Kernels& kernels_;
  ConvGeometry geometry_;
  int64_t outputs_, groups_;
  Quantization quantization_;
  std::vector<int32_t> offset_;  // added to the sums; empty: none

 private:
  struct Sizes;
  bool by_row(int64_t rows) const { return groups_ == 1 && geometry_.taps() == 1 && rows <= 4; }
  void quantize(const float* x, int64_t count, uint8_t* codes, ThreadPool& pool) const;
  template <class Load>
  void run_loaded(PatchSource& source, const LayerOutput& output, uint8_t* workspace,
                  ThreadPool& pool, const Load& load) const;
  void run_tiles(const PatchSource& source, const Sizes& s, const TileOutput& output,
                 uint8_t* shared, uint8_t* workers, ThreadPool& pool) const;
  void run_rows(const PatchSource& source, const TileOutput& output, uint8_t* workers,
                size_t stride, ThreadPool& pool) const;

  std::string name_;
  std::vector<float> scale_, bias_;
};

}  // namespace lutra
