// Small functions of each value alone, in plain float32 code for the baseline CPU.
#include <cmath>

#include "engine/core/op_registry.h"
#include "engine/steps/block_step.h"

namespace lutra {
namespace {

template <class F>
class Pointwise : public Elementwise {
 public:
  explicit Pointwise(F f) : f_(f) {}
  void apply(const float* x, size_t n, const Channels&, float* y) const override {
    in_chunks(x, n, y, [this](float v, size_t) { return f_(v); });
  }

 private:
  F f_;
};

template <class F>
int add_pointwise(PlanBuilder& plan, const StepArgs& args, F f) {
  return plan.add_step(elementwise_step(plan.kernels(), std::make_shared<Pointwise<F>>(f)),
                       args.inputs);
}

template <class F>
Operator pointwise(F f) {
  return {.build = [=](PlanBuilder& plan, const StepArgs& args) {
    return add_pointwise(plan, args, f);
  }};
}

int add_hardswish(PlanBuilder& plan, const StepArgs& args) {
  return plan.add_step(elementwise_step(plan.kernels(), hardswish(plan.kernels())), args.inputs);
}

int add_leaky_relu(PlanBuilder& plan, const StepArgs& args) {
  return plan.add_step(
      elementwise_step(plan.kernels(), leaky_relu(plan.kernels(), args.float32("slope"))),
      args.inputs);
}

}  // namespace

void pointwise_ops(OpRegistry& r) {
  r.add("abs", pointwise([](float x) { return std::fabs(x); }));
  r.add("sign", pointwise([](float x) {
          return (x > 0.0f ? 1.0f : 0.0f) - (x < 0.0f ? 1.0f : 0.0f);  // 0 for NaN
        }));
  r.add("floor", pointwise([](float x) { return std::floor(x); }));
  r.add("ceil", pointwise([](float x) { return std::ceil(x); }));
  r.add("round", pointwise([](float x) { return std::nearbyint(x); }));  // halves to even
  r.add("hardswish", {.build = add_hardswish});
  r.add("leaky_relu", {.build = add_leaky_relu});
}

}  // namespace lutra
