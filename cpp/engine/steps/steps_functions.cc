#include "engine/steps/steps_functions.h"

#include "engine/steps/block_step.h"

namespace lutra {
namespace {

class FunctionOf : public Elementwise {
 public:
  FunctionOf(const Kernels& kernels, Function function) : kernels_(kernels), function_(function) {}
  void apply(const float* x, size_t n, float* y) const override {
    kernels_.function(function_, x, n, y);
  }

 private:
  const Kernels& kernels_;
  Function function_;
};

class PiecewiseOf : public Elementwise {
 public:
  PiecewiseOf(const Kernels& kernels, const Piecewise& t)
      : kernels_(kernels),
        entries_(t.entries),
        breakpoint_(t.breakpoint, t.breakpoint + t.entries - 1),
        slope_(t.slope, t.slope + t.entries),
        intercept_(t.intercept, t.intercept + t.entries) {}
  void apply(const float* x, size_t n, float* y) const override {
    kernels_.piecewise({entries_, breakpoint_.data(), slope_.data(), intercept_.data()}, x, n, y);
  }

 private:
  const Kernels& kernels_;
  int32_t entries_;
  std::vector<float> breakpoint_, slope_, intercept_;
};

class ElementwiseStep : public BlockStep {
 public:
  ElementwiseStep(const Kernels& kernels, ElementwisePtr function)
      : BlockStep(kernels), function_(std::move(function)) {}
  Shape infer(const Shapes& in) const override { return in[0]; }
  ElementwisePtr elementwise() const override { return function_; }
  void run(const StepRun& r) const override {
    in_blocks(r, [&](int64_t first, int64_t count, float* to) {
      function_->apply(r.inputs[0] + first, static_cast<size_t>(count), to);
    });
  }

 private:
  ElementwisePtr function_;
};

}  // namespace

StepPtr elementwise_step(const Kernels& kernels, ElementwisePtr function) {
  return std::make_unique<ElementwiseStep>(kernels, std::move(function));
}
StepPtr function_step(const Kernels& kernels, Function function) {
  return elementwise_step(kernels, std::make_shared<FunctionOf>(kernels, function));
}
StepPtr piecewise_step(const Kernels& kernels, const Piecewise& table) {
  return elementwise_step(kernels, std::make_shared<PiecewiseOf>(kernels, table));
}

}  // namespace lutra
