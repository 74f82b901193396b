// A layer on integers, bound to one instruction set: what all families have in common.
//
// Quantised planes -> per tile of rows: find what is looked up or multiplied, do it, write. A
// linear layer is a 1x1 convolution over N "images" of one pixel. A family is a subclass, a
// function that makes it from the arguments of its operator, and kernels.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/core/memory.h"
#include "engine/core/op_registry.h"
#include "engine/layers/patch_source.h"
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
  Layer(const Layer&) = delete;
  Layer& operator=(const Layer&) = delete;

  const ConvGeometry& geometry() const { return geometry_; }
  const Quantization& quantization() const { return quantization_; }
  int64_t outputs() const { return outputs_; }

  // Packs what runs of so many rows need. Called before the first of them, from any thread.
  virtual void prepare(int64_t) const {}
  // Scratch of run(). `direct`: TileOutput::direct() of the output.
  size_t workspace_bytes(int64_t n, int64_t h, int64_t w, int threads, bool direct) const;
  // The input on the layer's grid.
  void run(const ByteView& x, const LayerOutput& output, uint8_t* workspace,
           ThreadPool& pool) const;
  // Floats in any layout. If `codes` is not null, the codes of x are written there.
  virtual void run(const ImageView& x, const LayerOutput& output, uint8_t* codes,
                   uint8_t* workspace, ThreadPool& pool) const;
  // Throws std::invalid_argument unless codes of so many rows from x have that place.
  virtual void check_codes(const ImageView& x, int64_t rows, const Codes& codes) const = 0;

  // For outputs that are only read on this grid.
  Fold fold(Clamp clamp, const Elementwise* function, const Quantization& grid) const {
    return fold_quantization(scale_, bias_, clamp, function, make_grid(grid), largest_sum());
  }
  // How run() does it, for profiles.
  virtual std::string method(int64_t rows) const = 0;
  virtual size_t parameter_bytes() const = 0;

 protected:
  // scale and bias (outputs). Throws std::invalid_argument, in the layer's name, unless it has
  // outputs and a grid of at most most_bits bits. The rest of the layer is the subclass's to check.
  Layer(std::string name, const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs,
        const Quantization& quantization, int most_bits, const float* scale, const float* bias);
  template <class... A>
  void require(bool ok, const char* pattern, const A&... words) const {
    if (!ok) fail(pattern, {words...});
  }
  // Throws std::invalid_argument: "<name> layer: <sentence>".
  [[noreturn]] void fail(const char* pattern, std::initializer_list<Word> words) const;

  // Where the rows of the source of a call come from.
  virtual ConvGeometry source_geometry() const { return geometry_; }
  // Memory of a run beside the planes, in bytes: for all workers, and for each.
  struct Memory {
    size_t shared, worker;
  };
  virtual Memory memory(const PatchSource& source, int threads, bool direct) const = 0;
  // Whatever the activations are, no sum with its offset is larger or smaller than this.
  virtual int64_t largest_sum() const = 0;
  struct Call {
    const PatchSource& source;
    const TileOutput& output;
    bool direct;
    uint8_t* codes;  // null: nobody wants them
    uint8_t *shared, *workers;
    ThreadPool& pool;
  };
  virtual void run_loaded(const Call& call) const = 0;

  const std::string name_;
  const Kernels& kernels_;
  const ConvGeometry geometry_;
  const int64_t outputs_;
  const Quantization quantization_;
  std::vector<int32_t> offset_;  // added to the sums; empty: none

 private:
  template <class X, class Load>
  void run_from(const X& x, const LayerOutput& output, uint8_t* codes, uint8_t* workspace,
                ThreadPool& pool, const Load& load) const;

  Grid grid_;
  std::vector<float> scale_, bias_;
};

// A layer from the arguments of its operator, of images or of rows.
using LayerMaker = std::unique_ptr<Layer> (*)(const Kernels&, const StepArgs&, bool linear);
int add_layer(PlanBuilder& plan, const StepArgs& args, std::unique_ptr<Layer> layer, bool linear);
template <LayerMaker make, bool linear>
Operator layer_operator() {
  return {.build =
              [](PlanBuilder& plan, const StepArgs& args) {
                return add_layer(plan, args, make(plan.kernels(), args, linear), linear);
              },
          .fuses = true,
          .layer = [](const Kernels& kernels,
                      const StepArgs& args) { return make(kernels, args, linear); }};
}

}  // namespace lutra
