// Convolution and linear steps, looked up and dense, each with its fused epilogue.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "engine/layers/int8.h"
#include "engine/layers/lookup.h"
#include "engine/layers/pq.h"
#include "engine/core/step.h"

namespace lutra {

// What all of them have: the layer works on images (N, C, H, W) or on rows (N, ..., D), and may add
// a second input before the clamp.
class LayerStep : public Step {
 public:
  LayerStep(const ConvGeometry& geometry, int64_t outputs, bool linear, bool residual, Clamp clamp)
      : geometry_(geometry),
        outputs_(outputs),
        linear_(linear),
        residual_(residual),
        clamp_(clamp) {}
  Shape infer(const Shapes& inputs) const override;
  int max_quantized() const override { return kMaxQuantized; }

 protected:
  template <class T>
  View<T> view(const Shape& shape, T* data) const;
  // What run() will find: it depends on the outputs too, for rows of one value are consecutive.
  bool direct(const Shapes& inputs) const {
    return TileOutput::direct(view<float>(infer(inputs), nullptr));
  }
  LayerOutput output(const StepRun& r) const;
  bool can_fold(const std::vector<Quantization>& grids, bool floats) const {
    return grids.size() == 1 && !floats && !residual_ && !function_;
  }
  int64_t rows(const Shape& x) const;

  ConvGeometry geometry_;  // of the whole layer
  int64_t outputs_;
  bool linear_, residual_;
  Clamp clamp_;
  ElementwisePtr function_;  // of what the rest makes
  Fold fold_;
};

// A layer on integers: PqLayer, Int8Layer, LookupLayer.
template <class Layer>
class QuantizedStep : public LayerStep {
 public:
  QuantizedStep(Layer layer, bool linear, bool residual, Clamp clamp)
      : LayerStep(layer.geometry(), layer.outputs(), linear, residual, clamp),
        layer_(std::move(layer)) {}
  size_t workspace(const Shapes& inputs, int threads) const override;
  void run(const StepRun& r) const override;
  void set_outputs(const std::vector<Quantization>& grids, bool floats) override;
  bool absorb(const Step& next) override {
    if (!function_) return (function_ = next.elementwise()) != nullptr;
    return false;
  }
  std::string method(const Shapes& inputs) const override { return layer_.method(rows(inputs[0])); }
  size_t parameter_bytes() const override { return layer_.parameter_bytes(); }

 private:
  Layer layer_;
};

using PqStep = QuantizedStep<PqLayer>;
using Int8Step = QuantizedStep<Int8Layer>;
using LookupStep = QuantizedStep<LookupLayer>;

class ConvStep : public LayerStep {
 public:
  // weight (outputs, geometry.channels / groups, kernel_h, kernel_w), bias (outputs)
  ConvStep(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs, int64_t groups,
           const float* weight, const float* bias, bool residual, Clamp clamp);
  size_t workspace(const Shapes& inputs, int threads) const override;
  void run(const StepRun& r) const override;
  std::string method(const Shapes&) const override { return "float32"; }
  size_t parameter_bytes() const override { return weight_.size() * sizeof(float); }

 private:
  struct Sizes;
  const Kernels& kernels_;
  int64_t groups_;
  std::vector<float> weight_, bias_;  // weight: packed, group after group
  size_t group_weights_;              // packed floats per group
};

// Few rows are multiplied one by one, many as the tiles of a convolution: the bits are the same.
class LinearStep : public LayerStep {
 public:
  // weight (outputs, features), bias (outputs)
  LinearStep(const Kernels& kernels, int64_t features, int64_t outputs, const float* weight,
             const float* bias, bool residual, Clamp clamp);
  size_t workspace(const Shapes& inputs, int threads) const override;
  void run(const StepRun& r) const override;
  std::string method(const Shapes&) const override { return "float32"; }
  size_t parameter_bytes() const override { return weight_.size() * sizeof(float); }

 private:
  bool by_row(const Shape& x) const { return rows(x) <= kFewRows; }
  const std::vector<float>& tile_weight() const;
  size_t worker_floats(const Shapes& inputs) const;
  void run_rows(const StepRun& r) const;
  void run_tiles(const StepRun& r) const;
  int64_t padded() const;

  static constexpr int64_t kFewRows = 8;

  const Kernels& kernels_;
  int64_t features_;
  std::vector<float> weight_, bias_;  // weight: packed for single rows
  struct Packed {
    std::once_flag once;
    std::vector<float> weight;  // for tiles, made when a plan is first prepared for many rows
  };
  std::unique_ptr<Packed> packed_ = std::make_unique<Packed>();
};

// From floats to a grid, for a value whose maker cannot do it.
StepPtr quantize_step(const Kernels& kernels);

}  // namespace lutra
