// Functions of one variable and piecewise-linear tables of them.
#include "engine/core/limits.h"
#include "engine/core/op_registry.h"
#include "engine/steps/block_step.h"
#include "engine/steps/function_tables.h"

namespace lutra {
namespace {

constexpr std::pair<const char*, Function> kFunctions[] = {
    {"gelu", Function::kGelu},         {"gelu_tanh", Function::kGeluTanh},
    {"silu", Function::kSilu},         {"tanh", Function::kTanh},
    {"sigmoid", Function::kSigmoid},   {"exp", Function::kExp},
    {"erf", Function::kErf},           {"sqrt", Function::kSqrt},
    {"rsqrt", Function::kRsqrt},       {"reciprocal", Function::kReciprocal},
    {"log", Function::kLog},           {"elu", Function::kElu},
    {"softplus", Function::kSoftplus}, {"mish", Function::kMish}};

int32_t checked_entries(const char* what, int64_t slopes, int64_t intercepts) {
  require(is_one_of(slopes, kFunctionEntries) && intercepts == slopes,
          "%: a table needs 8, 16 or 32 slopes and as many intercepts, not % and %", what, slopes,
          intercepts);
  return static_cast<int32_t>(slopes);
}

class FunctionOf : public Elementwise {
 public:
  FunctionOf(const Kernels& kernels, Function function) : kernels_(kernels), function_(function) {}
  void apply(const float* x, size_t n, const Channels&, float* y) const override {
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
  void apply(const float* x, size_t n, const Channels&, float* y) const override {
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
  Shape infer(const Shapes& in) const override {
    const int64_t channels = function_->channels();
    require(channels == 0 || (in[0].rank >= 2 && in[0][1] == channels),
            "a function of each of % channels got the shape %", channels, in[0]);
    return in[0];
  }
  ElementwisePtr elementwise() const override { return function_; }
  void run(const StepRun& r) const override {
    in_blocks(r, [&](int64_t first, int64_t count, float* to) {
      function_->apply(r.inputs[0] + first, static_cast<size_t>(count),
                       channels_at(r.out_shape, first), to);
    });
  }

 private:
  ElementwisePtr function_;
};

}  // namespace

StepPtr elementwise_step(const Kernels& kernels, ElementwisePtr function) {
  return std::make_unique<ElementwiseStep>(kernels, std::move(function));
}

Function function_named(const std::string& name) {
  std::string list;
  for (const auto& [known, f] : kFunctions) {
    if (name == known) return f;
    list += (list.empty() ? "" : ", ") + std::string(known);
  }
  throw std::invalid_argument("there is no function '" + name + "'; choose one of: " + list);
}

Segments checked_segments(const char* what, const Tensor<float>& slope,
                          const Tensor<float>& intercept) {
  return {.entries = checked_entries(what, slope[0], intercept[0]),
          .slope = slope.data,
          .intercept = intercept.data};
}

Piecewise checked_piecewise(const Tensor<float>& breakpoint, const Tensor<float>& slope,
                            const Tensor<float>& intercept) {
  const int32_t entries = checked_entries("piecewise", slope[0], intercept[0]);
  require(breakpoint[0] == entries - 1, "piecewise: % entries need % breakpoints, not %", entries,
          entries - 1, breakpoint[0]);
  for (int32_t i = 0; i < entries - 1; ++i) {
    const float* const b = breakpoint.data;
    require(b[i] == b[i] && (i == 0 || b[i - 1] <= b[i]),
            "piecewise: the breakpoints must ascend, and entry % does not", i);
  }
  return {.entries = entries,
          .breakpoint = breakpoint.data,
          .slope = slope.data,
          .intercept = intercept.data};
}

LineTable line_table(const StepArgs& args, const std::string& function) {
  const std::string slopes = function + "_slope", intercepts = function + "_intercept";
  if (!args.has(slopes.c_str()) && !args.has(intercepts.c_str())) return {};
  const Tensor<float> slope = args.tensor<float>(slopes.c_str(), 1);
  const Tensor<float> intercept = args.tensor<float>(intercepts.c_str(), 1);
  checked_segments(args.op.c_str(), slope, intercept);
  return {slope.values(), intercept.values()};
}

ExpTables exp_tables(const StepArgs& args) {
  ExpTables tables{line_table(args, "exp"), line_table(args, "reciprocal")};
  require(tables.exp.empty() == tables.reciprocal.empty(),
          "%: exp and reciprocal are both tables, or neither is", args.op);
  return tables;
}

namespace {

int add_function(PlanBuilder& plan, const StepArgs& args) {
  const bool tanh = args.op == "gelu" && args.text("approximate") == "tanh";
  const Function function = tanh ? Function::kGeluTanh : function_named(args.op);
  return plan.add_step(
      elementwise_step(plan.kernels(), std::make_shared<FunctionOf>(plan.kernels(), function)),
      args.inputs);
}

int add_piecewise(PlanBuilder& plan, const StepArgs& args) {
  const Piecewise table =
      checked_piecewise(args.tensor<float>("breakpoint", 1), args.tensor<float>("slope", 1),
                        args.tensor<float>("intercept", 1));
  return plan.add_step(
      elementwise_step(plan.kernels(), std::make_shared<PiecewiseOf>(plan.kernels(), table)),
      args.inputs);
}

}  // namespace

void function_ops(OpRegistry& r) {
  for (const auto& [name, function] : kFunctions) {
    if (function != Function::kGeluTanh) r.add(name, {.build = add_function});
  }
  r.add("piecewise", {.build = add_piecewise});
}

}  // namespace lutra
