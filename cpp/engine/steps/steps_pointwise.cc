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
int add_pointwise(PlanBuilder& plan, const StepArgs& args, const F& f) {
  return plan.add_step(elementwise_step(plan.kernels(), std::make_shared<Pointwise<F>>(f)),
                       args.inputs);
}

template <class F>  // without state
Operator pointwise(F) {
  return {.build = [](PlanBuilder& plan, const StepArgs& args) {
    return add_pointwise(plan, args, F());
  }};
}

int add_hardswish(PlanBuilder& plan, const StepArgs& args) {
  return plan.add_step(elementwise_step(plan.kernels(), hardswish(plan.kernels())), args.inputs);
}

// sin and cos: in float64, by multiplies and adds in this order, so that every CPU and the
// reference give the same bits. With k the multiple of pi / 2 next to x, r = x - k pi / 2 takes two
// subtractions (Cody and Waite): k times the first part of pi / 2, of 33 bits, is exact up to
// k = 2^20. The series of Taylor up to r^14 are exact to 1e-14 for |r| <= pi / 4.
float of_quarters(float x, double ahead) {
  constexpr double kTurn = 0x1.921fb54442d18p+2, kPerTurn = 0x1.45f306dc9c883p-1,
                   kFirst = 0x1.921fb54400000p+0, kRest = 0x1.0b4611a626331p-34;
  double v = static_cast<double>(x);
  if (std::fabs(v) > 1048576.0) v = std::fmod(v, kTurn);
  const double k = std::nearbyint(v * kPerTurn);
  const double r = (v - k * kFirst) - k * kRest;
  const double turn = k + ahead;
  const double quarter = turn - 4.0 * std::floor(turn / 4.0);  // NaN for infinity
  const double s = r * r;
  double y;
  if (quarter == 0.0 || quarter == 2.0) {
    y = 1.0 / 6227020800.0;
    for (const double c :
         {-1.0 / 39916800.0, 1.0 / 362880.0, -1.0 / 5040.0, 1.0 / 120.0, -1.0 / 6.0, 1.0}) {
      y = y * s + c;
    }
    y = y * r;
  } else {
    y = -1.0 / 87178291200.0;
    for (const double c : {1.0 / 479001600.0, -1.0 / 3628800.0, 1.0 / 40320.0, -1.0 / 720.0,
                           1.0 / 24.0, -1.0 / 2.0, 1.0}) {
      y = y * s + c;
    }
  }
  return static_cast<float>(quarter >= 2.0 ? -y : y);
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
  r.add("sin", pointwise([](float x) { return of_quarters(x, 0.0); }));
  r.add("cos", pointwise([](float x) { return of_quarters(x, 1.0); }));
  r.add("hardswish", {.build = add_hardswish});
  r.add("leaky_relu", {.build = add_leaky_relu});
}

}  // namespace lutra
