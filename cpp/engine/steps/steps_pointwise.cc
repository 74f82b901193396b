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
    for (size_t i = 0; i < n; ++i) y[i] = f_(x[i]);
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

float hardswish(float x) {
  const float above = x + 3.0f > 0.0f ? x + 3.0f : 0.0f;
  return x * (above < 6.0f ? above : 6.0f) / 6.0f;
}

int add_leaky_relu(PlanBuilder& plan, const StepArgs& args) {
  const float slope = args.float32("slope");
  return add_pointwise(plan, args, [=](float x) { return x > 0.0f ? x : x * slope; });
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
  r.add("hardswish", pointwise([](float x) { return hardswish(x); }));
  r.add("leaky_relu", {.build = add_leaky_relu});
}

}  // namespace lutra
