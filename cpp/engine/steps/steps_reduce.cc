// Reductions over whole axes, and cumulative sums.
#include <algorithm>
#include <cmath>

#include "engine/core/op_registry.h"

namespace lutra {
namespace {

using Inputs = std::vector<const float*>;

constexpr double kPerMicrosecond = 2e3;  // elements, a rough guess for one core
constexpr int64_t kBlock = 16384;        // elements per work item

template <class T>
T larger(T a, T b) {
  return a > b ? a : b;  // b where a is NaN
}

template <class T>
T line_max(const T* x, int64_t count, T top) {
  constexpr int64_t kLanes = 64 / sizeof(T);  // side by side, which becomes vector code
  T lanes[kLanes];
  std::fill(lanes, lanes + kLanes, top);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] = larger(x[i + k], lanes[k]);
  }
  for (; i < count; ++i) top = larger(x[i], top);
  for (const T lane : lanes) top = larger(lane, top);
  return top;
}

// An axis, or several that are one in memory on both sides.
struct Axis {
  int64_t size, from, to;  // strides; `to` is 0 where the axis is reduced
  bool reduced;
};

// What makes one value of all along some axes, none of them 0.
class ReduceStep : public FloatStep {
 public:
  ReduceStep(const char* name, const std::vector<int>& axes, bool keepdims)
      : reduced_(kMaxRank, false), keepdims_(keepdims) {
    for (int a : axes) {
      require(a >= 1 && a < kMaxRank, "%: axis % is not 1..7", name, a);
      reduced_[static_cast<size_t>(a)] = true;
    }
  }

  Shape infer(const Shapes& in) const override {
    Shape y;
    for (int i = 0; i < in[0].rank; ++i) {
      if (!reduced(i)) {
        y[y.rank++] = in[0][i];
      } else if (keepdims_) {
        y[y.rank++] = 1;
      }
    }
    return y;
  }

 protected:
  bool reduced(int axis) const { return reduced_[static_cast<size_t>(axis)]; }

  // The axes in the order of memory, the longest steps first.
  std::vector<Axis> merged(const Shape& x, const Shape& y) const {
    const Dims from = storage_strides(x), to = storage_strides(y);
    Dims target{};
    for (int i = 0, o = 0; i < x.rank; ++i) {
      if (!reduced(i)) target[i] = to[o];
      if (!reduced(i) || keepdims_) ++o;
    }
    std::vector<Axis> axes;
    for (int k = 0; k < x.rank; ++k) {
      const int i = storage_axis(x.rank, k);
      if (x[i] == 1) continue;
      const Axis axis{x[i], from[i], target[i], reduced(i)};
      if (!axes.empty() && axes.back().reduced == axis.reduced &&
          axes.back().from == axis.from * axis.size &&
          (axis.reduced || axes.back().to == axis.to * axis.size)) {
        axes.back() = {axes.back().size * axis.size, axis.from, axis.to, axis.reduced};
      } else {
        axes.push_back(axis);
      }
    }
    return axes;
  }

  // Work items are parts of the first axis that is kept, so that each writes its own results:
  // work(axes of the part, where it begins in the input, and in the output).
  template <class F>
  static void in_parts(const std::vector<Axis>& axes, int64_t elements, ThreadPool& pool,
                       const F& work) {
    const auto kept =
        std::find_if(axes.begin(), axes.end(), [](const Axis& a) { return !a.reduced; });
    const int64_t size = kept == axes.end() ? 1 : kept->size;
    const int64_t block = std::max<int64_t>(1, kBlock * size / std::max<int64_t>(elements, 1));
    pool.run(static_cast<size_t>((size + block - 1) / block),
             static_cast<double>(elements) / kPerMicrosecond, [&](size_t item, int) {
               std::vector<Axis> mine = axes;
               const int64_t first = static_cast<int64_t>(item) * block;
               if (kept == axes.end()) return work(mine, 0, 0);
               mine[static_cast<size_t>(kept - axes.begin())].size = std::min(block, size - first);
               work(mine, first * kept->from, first * kept->to);
             });
  }

 private:
  std::vector<bool> reduced_;
  bool keepdims_;
};

// The largest value over the axes. NaN is passed over; where all are NaN the result is minus
// infinity.
class MaxStep : public ReduceStep {
 public:
  MaxStep(const std::vector<int>& axes, bool keepdims) : ReduceStep("max", axes, keepdims) {}

  StepPtr on_bytes() const override;
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool& pool) const override {
    reduce<float>(shapes[0], in[0], y, out, -INFINITY, pool);
  }

  template <class T>
  void reduce(const Shape& x, const T* in, const Shape& y, T* out, T lowest,
              ThreadPool& pool) const {
    const std::vector<Axis> axes = merged(x, y);
    std::fill(out, out + y.size(), lowest);
    in_parts(axes, x.size(), pool, [&](const std::vector<Axis>& mine, int64_t from, int64_t to) {
      visit(mine, 0, in + from, out + to);
    });
  }

 private:
  template <class T>
  static void visit(const std::vector<Axis>& axes, size_t level, const T* in, T* out) {
    if (level == axes.size()) {
      *out = larger(*in, *out);
      return;
    }
    const Axis& a = axes[level];
    if (level + 1 < axes.size() || a.from != 1) {
      for (int64_t i = 0; i < a.size; ++i) visit(axes, level + 1, in + i * a.from, out + i * a.to);
    } else if (a.reduced) {
      *out = line_max(in, a.size, *out);
    } else if (a.to == 1) {
      for (int64_t i = 0; i < a.size; ++i) out[i] = larger(in[i], out[i]);
    } else {
      for (int64_t i = 0; i < a.size; ++i) out[i * a.to] = larger(in[i], out[i * a.to]);
    }
  }
};

// The greatest of integers on a grid, which keeps their order; 0 is below all of them.
class ByteMaxStep : public Step {
 public:
  explicit ByteMaxStep(const MaxStep& step) : step_(step) {}
  Shape infer(const Shapes& in) const override { return step_.infer(in); }
  std::string method(const Shapes&) const override { return "uint8"; }
  void run(const StepRun& r) const override {
    step_.reduce<uint8_t>(r.shapes[0], r.bytes, r.out_shape, r.q[0].data, 0, r.pool);
  }

 private:
  MaxStep step_;
};

StepPtr MaxStep::on_bytes() const { return std::make_unique<ByteMaxStep>(*this); }

// The square root of the sum of the squares, which are added in float64, in the order of memory.
class L2NormStep : public ReduceStep {
 public:
  L2NormStep(const std::vector<int>& axes, bool keepdims) : ReduceStep("l2_norm", axes, keepdims) {}

  size_t workspace(const Shapes& in, int) const override {
    return static_cast<size_t>(infer(in).size()) * sizeof(double);
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t* workspace,
           ThreadPool& pool) const override {
    double* const sums = reinterpret_cast<double*>(workspace);
    std::fill(sums, sums + y.size(), 0.0);
    in_parts(merged(shapes[0], y), shapes[0].size(), pool,
             [&](const std::vector<Axis>& mine, int64_t from, int64_t to) {
               add(mine, 0, in[0] + from, sums + to);
             });
    for (int64_t i = 0; i < y.size(); ++i) out[i] = static_cast<float>(std::sqrt(sums[i]));
  }

 private:
  static void add(const std::vector<Axis>& axes, size_t level, const float* x, double* sum) {
    if (level == axes.size()) {
      *sum += static_cast<double>(*x) * static_cast<double>(*x);
      return;
    }
    const Axis& a = axes[level];
    for (int64_t i = 0; i < a.size; ++i) add(axes, level + 1, x + i * a.from, sum + i * a.to);
  }
};

// The sums of everything up to each entry of an axis, added in float32 one after the other.
class CumulativeSumStep : public FloatStep {
 public:
  explicit CumulativeSumStep(int axis) : axis_(axis) {
    require(axis >= 1 && axis < kMaxRank, "cumsum: axis % is not 1..7", axis);
  }
  Shape infer(const Shapes& in) const override {
    require(axis_ < in[0].rank, "cumsum: no axis % in %", axis_, in[0]);
    return in[0];
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape&, float* out, uint8_t*,
           ThreadPool& pool) const override {
    const int64_t size = shapes[0][axis_], step = storage_strides(shapes[0])[axis_];
    const int64_t outer = shapes[0].size() / std::max<int64_t>(size * step, 1);
    pool.run(static_cast<size_t>(outer), static_cast<double>(shapes[0].size()) / kPerMicrosecond,
             [&](size_t item, int) {
               const int64_t first = static_cast<int64_t>(item) * size * step;
               std::copy_n(in[0] + first, step, out + first);
               for (int64_t i = step; i < size * step; ++i) {
                 out[first + i] = out[first + i - step] + in[0][first + i];
               }
             });
  }

 private:
  int axis_;
};

int add_cumsum(PlanBuilder& plan, const StepArgs& args) {
  return add_step<CumulativeSumStep>(plan, args, args.int32("axis"));
}

template <class S>
int add_reduction(PlanBuilder& plan, const StepArgs& args) {
  return add_step<S>(plan, args, args.int32s("axes"), args.flag("keepdims"));
}

}  // namespace

void reduce_ops(OpRegistry& r) {
  r.add("max", {.build = add_reduction<MaxStep>});
  r.add("l2_norm", {.build = add_reduction<L2NormStep>});
  r.add("cumsum", {.build = add_cumsum});
}

}  // namespace lutra
