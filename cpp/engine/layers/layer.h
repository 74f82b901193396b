// A layer on integers, bound to one instruction set: what all families have in common.
//
// A family is a Layer, a function that makes it from the arguments of its operator, and kernels.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/core/fold.h"
#include "engine/core/op_registry.h"
#include "engine/layers/conv_geometry.h"
#include "engine/layers/tile_output.h"

namespace lutra {

// Where the caller wants the codes of a run.
struct Codes {
  uint8_t* data = nullptr;
  std::vector<int64_t> shape, strides;  // in elements
};

class Layer {
 public:
  virtual ~Layer() = default;

  virtual const ConvGeometry& geometry() const = 0;
  virtual const Quantization& quantization() const = 0;
  virtual int64_t outputs() const = 0;

  // Packs what runs of so many rows need. Called before the first of them, from any thread.
  virtual void prepare(int64_t) const {}
  // Scratch of run(). `direct`: TileOutput::direct() of the output.
  virtual size_t workspace_bytes(int64_t n, int64_t h, int64_t w, int threads,
                                 bool direct) const = 0;
  // The input on the layer's grid.
  virtual void run(const ByteView& x, const LayerOutput& output, uint8_t* workspace,
                   ThreadPool& pool) const = 0;
  // Floats in any layout. If `codes` is not null, the codes of x are written there.
  virtual void run(const ImageView& x, const LayerOutput& output, uint8_t* codes,
                   uint8_t* workspace, ThreadPool& pool) const = 0;
  // Throws std::invalid_argument unless codes of so many rows from x have that place.
  virtual void check_codes(const ImageView& x, int64_t rows, const Codes& codes) const = 0;

  // For outputs that are only read on this grid.
  virtual Fold fold(Clamp clamp, const Quantization& grid) const = 0;
  // How run() does it, for profiles.
  virtual std::string method(int64_t rows) const = 0;
  virtual size_t parameter_bytes() const = 0;
};

// A layer from the arguments of its operator, of images or of rows.
using LayerMaker = std::unique_ptr<Layer> (*)(const Kernels&, const StepArgs&, bool linear);
Operator layer_operator(LayerMaker make, bool linear);

}  // namespace lutra
