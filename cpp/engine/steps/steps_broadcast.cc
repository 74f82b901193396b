// Arithmetic and comparisons of two values, choices between two by a third, constants, and steps
// that only move values: transposing and repeating.
#include <algorithm>
#include <array>

#include "engine/core/op_registry.h"
#include "engine/steps/block_step.h"

namespace lutra {
namespace {

using Inputs = std::vector<const float*>;

// An axis of the output, or several that are one in both inputs. Strides are 0 where an input is
// repeated.
struct PairAxis {
  int64_t size, a, b;
};

// y[i] = f(a[i sa], b[i sb])
using Line = void (*)(const float* a, int64_t sa, const float* b, int64_t sb, int64_t count,
                      float* y);

template <class F>
void over_line(const float* a, int64_t sa, const float* b, int64_t sb, int64_t count, float* y) {
  constexpr F f;
  if (sa == 1 && sb == 1) {
    for (int64_t i = 0; i < count; ++i) y[i] = f(a[i], b[i]);
  } else if (sa == 1 && sb == 0) {
    for (int64_t i = 0; i < count; ++i) y[i] = f(a[i], *b);
  } else if (sa == 0 && sb == 1) {
    for (int64_t i = 0; i < count; ++i) y[i] = f(*a, b[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) y[i] = f(a[i * sa], b[i * sb]);
  }
}

class PairStep : public BlockStep {
 public:
  PairStep(const Kernels& kernels, std::string name, bool broadcast, Line line)
      : BlockStep(kernels), name_(std::move(name)), broadcast_(broadcast), line_(line) {}

  Shape infer(const Shapes& in) const override {
    bool fits = in[0].rank == in[1].rank;
    Shape y = in[0];
    for (int i = 0; fits && i < y.rank; ++i) {
      if (broadcast_ && y[i] == 1) y[i] = in[1][i];
      fits = in[1][i] == y[i] || (broadcast_ && in[1][i] == 1);
    }
    require(fits, "%: the shapes % and %%", name_, in[0], in[1],
            (broadcast_ ? " do not fit each other: ranks must be equal, and sizes equal "
                          "or 1"
                        : " differ"));
    return y;
  }

  void run(const StepRun& r) const override {
    const std::vector<PairAxis> axes = merged(r.shapes[0], r.shapes[1], r.out_shape);
    const PairAxis line = axes.back();
    in_blocks(r, [&](int64_t first, int64_t count, float* to) {
      for (int64_t done = 0; done < count;) {
        // Where the line of this element begins.
        int64_t rest = (first + done) / line.size;
        const int64_t column = (first + done) % line.size;
        const float* a = r.inputs[0] + column * line.a;
        const float* b = r.inputs[1] + column * line.b;
        for (size_t k = axes.size() - 1; k-- > 0; rest /= axes[k].size) {
          a += rest % axes[k].size * axes[k].a;
          b += rest % axes[k].size * axes[k].b;
        }
        const int64_t some = std::min(line.size - column, count - done);
        line_(a, line.a, b, line.b, some, to + done);
        done += some;
      }
    });
  }

 private:
  static std::vector<PairAxis> merged(const Shape& a, const Shape& b, const Shape& y) {
    const Dims sa = storage_strides(a), sb = storage_strides(b);
    std::vector<PairAxis> axes;
    for (int k = 0; k < y.rank; ++k) {
      const int i = storage_axis(y.rank, k);
      if (y[i] == 1) continue;
      const PairAxis axis{y[i], a[i] == 1 ? 0 : sa[i], b[i] == 1 ? 0 : sb[i]};
      if (!axes.empty() && axes.back().a == axis.a * axis.size &&
          axes.back().b == axis.b * axis.size) {
        axes.back() = {axes.back().size * axis.size, axis.a, axis.b};
      } else {
        axes.push_back(axis);
      }
    }
    if (axes.empty()) axes.push_back({1, 0, 0});
    return axes;
  }

  std::string name_;
  bool broadcast_;
  Line line_;
};

// a where the condition is not 0, else b; sizes of 1 are repeated.
class WhereStep : public BlockStep {
 public:
  using BlockStep::BlockStep;

  Shape infer(const Shapes& in) const override {
    Shape y = in[0];
    for (const Shape& x : in) {
      bool fits = x.rank == y.rank;
      for (int i = 0; fits && i < y.rank; ++i) {
        if (y[i] == 1) y[i] = x[i];
        fits = x[i] == y[i] || x[i] == 1;
      }
      require(fits,
              "where: the shapes %, % and % do not fit each other: ranks must be equal, and sizes "
              "equal or 1",
              in[0], in[1], in[2]);
    }
    return y;
  }

  void run(const StepRun& r) const override {
    const Shape& y = r.out_shape;
    std::array<Dims, 3> strides{};
    for (size_t k = 0; k < 3; ++k) {
      strides[k] = storage_strides(r.shapes[k]);
      for (int i = 0; i < y.rank; ++i) {
        if (r.shapes[k][i] == 1) strides[k][i] = 0;
      }
    }
    const int last = storage_axis(y.rank, y.rank - 1);
    const int64_t line = y[last];
    in_blocks(r, [&](int64_t first, int64_t count, float* to) {
      for (int64_t done = 0; done < count;) {
        const int64_t column = (first + done) % line, some = std::min(line - column, count - done);
        std::array<const float*, 3> at{};
        for (size_t k = 0; k < 3; ++k) {
          at[k] = r.inputs[k] + column * strides[k][last];
          int64_t rest = (first + done) / line;
          for (int j = y.rank - 2; j >= 0; --j) {
            const int axis = storage_axis(y.rank, j);
            at[k] += rest % y[axis] * strides[k][axis];
            rest /= y[axis];
          }
        }
        const int64_t sc = strides[0][last], sa = strides[1][last], sb = strides[2][last];
        for (int64_t i = 0; i < some; ++i) {
          to[done + i] = at[0][i * sc] != 0.0f ? at[1][i * sa] : at[2][i * sb];
        }
        done += some;
      }
    });
  }
};

// The same numbers for every sample of the batch of its input, of which nothing else matters.
class ConstantStep : public FloatStep {
 public:
  ConstantStep(std::vector<float> value, const std::vector<int64_t>& shape)
      : value_(std::move(value)) {
    shape_.rank = 1 + static_cast<int>(shape.size());
    require(shape_.rank <= kMaxRank, "constant: more than 8 axes");
    shape_[0] = 1;
    for (int i = 1; i < shape_.rank; ++i) shape_[i] = shape[static_cast<size_t>(i - 1)];
    require(shape_.size() == static_cast<int64_t>(value_.size()),
            "constant: % numbers for the shape %", value_.size(), shape_);
  }
  Shape infer(const Shapes& in) const override {
    Shape y = shape_;
    y[0] = in[0].batch();
    return y;
  }
  void run(const Shapes&, const Inputs&, const Shape& y, float* out, uint8_t*,
           ThreadPool&) const override {
    Dims from = row_major_strides(shape_);
    from[0] = 0;
    copy_strided(y, value_.data(), from, out, storage_strides(y));
  }
  size_t parameter_bytes() const override { return value_.size() * sizeof(float); }

 private:
  std::vector<float> value_;
  Shape shape_;
};

class CastStep : public FloatStep {
 public:
  bool reads_integers(size_t) const override { return true; }
  Shape infer(const Shapes& in) const override { return in[0]; }
  void run(const Shapes& shapes, const Inputs& in, const Shape&, float* out, uint8_t*,
           ThreadPool&) const override {
    const int32_t* const x = integers_of(in[0]);
    for (int64_t i = 0; i < shapes[0].size(); ++i) out[i] = static_cast<float>(x[i]);
  }
};

class TransposeStep : public FloatStep {
 public:
  explicit TransposeStep(std::vector<int> axes) : axes_(std::move(axes)) {
    for (int i = 0; i < static_cast<int>(axes_.size()); ++i) {
      require(std::find(axes_.begin(), axes_.end(), i) != axes_.end(),
              "transpose: its axes are no permutation");
    }
    require(!axes_.empty() && axes_[0] == 0, "transpose: the first axis must stay the first");
  }
  Shape infer(const Shapes& in) const override {
    require(in[0].rank == static_cast<int>(axes_.size()), "transpose: % axes for the shape %",
            axes_.size(), in[0]);
    Shape y = in[0];
    for (int i = 0; i < y.rank; ++i) y[i] = in[0][axes_[static_cast<size_t>(i)]];
    return y;
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool&) const override {
    const Dims strides = storage_strides(shapes[0]);
    Dims from{};
    for (int i = 0; i < y.rank; ++i) from[i] = strides[axes_[static_cast<size_t>(i)]];
    copy_strided(y, in[0], from, out, storage_strides(y));
  }

 private:
  std::vector<int> axes_;
};

class ExpandStep : public FloatStep {
 public:
  explicit ExpandStep(std::vector<int64_t> shape) : shape_(std::move(shape)) {}
  Shape infer(const Shapes& in) const override {
    Shape y = in[0];
    require(y.rank == static_cast<int>(shape_.size()) + 1, "expand: % sizes for the shape %",
            shape_.size(), y);
    for (int i = 1; i < y.rank; ++i) {
      const int64_t size = shape_[static_cast<size_t>(i - 1)];
      require(size == 0 || size == y[i] || (size > 0 && y[i] == 1),
              "expand: axis % of % cannot become %", i, y, size);
      if (size > 0) y[i] = size;
    }
    return y;
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool&) const override {
    Dims from = storage_strides(shapes[0]);
    for (int i = 0; i < y.rank; ++i) {
      if (shapes[0][i] != y[i]) from[i] = 0;
    }
    copy_strided(y, in[0], from, out, storage_strides(y));
  }

 private:
  std::vector<int64_t> shape_;
};

// Equal shapes are equal in every run, also where their sizes are not known yet.
int add_pair(PlanBuilder& plan, const StepArgs& args, Line line) {
  const bool equal = args.input_shapes[0] == args.input_shapes[1];
  return add_step<PairStep>(plan, args, plan.kernels(), args.op, !equal, line);
}

// Of every pair of elements; F, which has no state, is the arithmetic.
template <class F>
Operator pair_operator(F) {
  return {.build = [](PlanBuilder& plan,
                      const StepArgs& args) { return add_pair(plan, args, over_line<F>); },
          .inputs = 2};
}

int add_where(PlanBuilder& plan, const StepArgs& args) {
  return add_step<WhereStep>(plan, args, plan.kernels());
}

int add_constant(PlanBuilder& plan, const StepArgs& args) {
  return add_step<ConstantStep>(plan, args, args.tensor<float>("value", 1).values(),
                                args.integers("shape"));
}

int add_affine_scalar(PlanBuilder& plan, const StepArgs& args) {
  return plan.add_step(
      elementwise_step(plan.kernels(),
                       affine(plan.kernels(), {args.float32("scale")}, {args.float32("bias")})),
      args.inputs);
}

int add_cast(PlanBuilder& plan, const StepArgs& args) { return add_step<CastStep>(plan, args); }

int add_transpose(PlanBuilder& plan, const StepArgs& args) {
  return add_step<TransposeStep>(plan, args, args.int32s("axes"));
}

int add_expand(PlanBuilder& plan, const StepArgs& args) {
  return add_step<ExpandStep>(plan, args, args.integers("shape"));
}

}  // namespace

void arithmetic_ops(OpRegistry& r) {
  r.add("add", pair_operator([](float a, float b) { return a + b; }));
  r.add("sub", pair_operator([](float a, float b) { return a - b; }));
  r.add("mul", pair_operator([](float a, float b) { return a * b; }));
  r.add("div", pair_operator([](float a, float b) { return a / b; }));
  // NaN where one is NaN
  r.add("maximum", pair_operator([](float a, float b) { return a > b || a != a ? a : b; }));
  r.add("minimum", pair_operator([](float a, float b) { return a < b || a != a ? a : b; }));
  r.add("greater", pair_operator([](float a, float b) { return a > b ? 1.0f : 0.0f; }));
  r.add("greater_equal", pair_operator([](float a, float b) { return a >= b ? 1.0f : 0.0f; }));
  r.add("equal", pair_operator([](float a, float b) { return a == b ? 1.0f : 0.0f; }));
  r.add("where", {.build = add_where, .inputs = 3});
  r.add("constant", {.build = add_constant});
  r.add("affine_scalar", {.build = add_affine_scalar});
  r.add("cast", {.build = add_cast});
  r.add("transpose", {.build = add_transpose});
  r.add("expand", {.build = add_expand});
}

}  // namespace lutra
