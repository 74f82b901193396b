// Convolution and linear steps, looked up and dense, each with its fused epilogue.
#pragma once

#include "pq_layer.h"
#include "step.h"

namespace lutra {

// Inputs: x, and the tensor to add before the clamp if `residual`.
class PqConvStep : public Step {
 public:
  PqConvStep(PqLayer layer, bool linear, bool residual, Clamp clamp);
  Shape infer(const std::vector<Shape>& inputs) const override;
  size_t workspace(const std::vector<Shape>& inputs, int threads) const override;
  void run(const std::vector<Shape>& shapes, const std::vector<const float*>& inputs,
           const Shape& out_shape, float* out, uint8_t* workspace, ThreadPool& pool) const override;

 private:
  ImageView view(const Shape& shape, const float* data) const;
  PqLayer layer_;
  bool linear_, residual_;
  Clamp clamp_;
};

class ConvStep : public Step {
 public:
  // weight (outputs, geometry.channels / groups, kernel_h, kernel_w), bias (outputs)
  ConvStep(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs, int64_t groups,
           const float* weight, const float* bias, bool residual, Clamp clamp);
  Shape infer(const std::vector<Shape>& inputs) const override;
  size_t workspace(const std::vector<Shape>& inputs, int threads) const override;
  void run(const std::vector<Shape>& shapes, const std::vector<const float*>& inputs,
           const Shape& out_shape, float* out, uint8_t* workspace, ThreadPool& pool) const override;

 private:
  struct Sizes;
  const Kernels& kernels_;
  ConvGeometry geometry_;  // of the whole layer
  int64_t outputs_, groups_;
  std::vector<float> weight_, bias_;  // weight: packed, group after group
  size_t group_weights_;              // packed floats per group
  bool residual_;
  Clamp clamp_;
};

class LinearStep : public Step {
 public:
  // weight (outputs, features), bias (outputs)
  LinearStep(const Kernels& kernels, int64_t features, int64_t outputs, const float* weight,
             const float* bias, bool residual, Clamp clamp);
  Shape infer(const std::vector<Shape>& inputs) const override;
  size_t workspace(const std::vector<Shape>& inputs, int threads) const override;
  void run(const std::vector<Shape>& shapes, const std::vector<const float*>& inputs,
           const Shape& out_shape, float* out, uint8_t* workspace, ThreadPool& pool) const override;

 private:
  int64_t padded() const;
  const Kernels& kernels_;
  int64_t features_, outputs_;
  std::vector<float> weight_, bias_;
  bool residual_;
  Clamp clamp_;
};

}  // namespace lutra
