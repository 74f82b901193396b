// A layer that reads all activations of a row at once: what dense int8 and lookup layers share. Few
// rows of a linear layer run by themselves, without tiles.
#pragma once

#include <string>

#include "engine/layers/grid_layer.h"

namespace lutra {

class GatheredLayer : public GridLayer {
 public:
  std::string method(int64_t rows) const override {
    return by_row(rows) ? name_ + ", rows" : name_;
  }

 protected:
  using GridLayer::GridLayer;

  // The kernels, for a tile of one group.
  virtual size_t gathered_bytes() const = 0;
  virtual void gather(const Patch& patch, uint8_t* gathered) const = 0;
  virtual void multiply(int64_t group, const uint8_t* gathered, int64_t first, int64_t last,
                        const Epilogue& e) const = 0;
  // One row of a layer without groups. x is padded with zeros to a multiple of 64 bytes.
  virtual void multiply_row(const uint8_t* x, int64_t first, int64_t last, int32_t* sums) const = 0;

 private:
  struct Sizes;
  bool by_row(int64_t rows) const { return groups_ == 1 && geometry_.taps() == 1 && rows <= 4; }
  Memory memory(const PatchSource& source, int threads, bool direct) const override;
  void run_loaded(const Call& call) const override;
  void run_rows(const Call& call, size_t stride) const;
};

}  // namespace lutra
