// Element-wise steps of constants, means, and steps of shapes. All are plain float32 code for the
// baseline CPU.
#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/core/op_registry.h"
#include "engine/steps/block_step.h"

namespace lutra {

namespace {

using Inputs = std::vector<const float*>;

constexpr double kPerMicrosecond = 1e3;  // elements, a rough guess for one core
// Visits every index of `shape` with the axes of `skip` held at zero, in row-major order.
template <class F>
void visit(const Shape& shape, const std::vector<bool>& skip, const F& f) {
  Dims index{};
  for (;;) {
    f(index);
    int axis = shape.rank - 1;
    for (; axis >= 0; --axis) {
      if (skip[axis]) continue;
      if (++index[axis] < shape[axis]) break;
      index[axis] = 0;
    }
    if (axis < 0) return;
  }
}

int64_t offset(const Dims& index, const Dims& strides, int rank) {
  int64_t o = 0;
  for (int i = 0; i < rank; ++i) o += index[i] * strides[i];
  return o;
}

class MeanStep : public FloatStep {
 public:
  MeanStep(std::vector<int> axes, bool keepdims) : reduced_(kMaxRank, false), keepdims_(keepdims) {
    for (int a : axes) {
      require(a >= 1 && a < kMaxRank, "mean: axis % is not 1..7", a);
      reduced_[a] = true;
    }
  }
  Shape infer(const Shapes& in) const override {
    Shape y;
    for (int i = 0; i < in[0].rank; ++i) {
      if (!reduced_[i]) {
        y[y.rank++] = in[0][i];
      } else if (keepdims_) {
        y[y.rank++] = 1;
      }
    }
    return y;
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape& out_shape, float* out, uint8_t*,
           ThreadPool& pool) const override {
    const Shape& s = shapes[0];
    if (s.rank == 4 && reduced_[2] && reduced_[3] && !reduced_[1])
      return over_images(s, in[0], out, pool);
    const Dims from = storage_strides(s), to = storage_strides(out_shape);
    Shape window = s;
    std::vector<bool> kept(kMaxRank, false);
    for (int i = 0; i < s.rank; ++i) kept[i] = !reduced_[i];
    float count = 1.0f;
    for (int i = 0; i < s.rank; ++i) {
      if (reduced_[i]) count *= static_cast<float>(s[i]);
    }
    // Reduced axes that are consecutive in memory are added as one line.
    int64_t line = 1;
    for (int k = s.rank - 1, axis; k > 1 && reduced_[axis = storage_axis(s.rank, k)]; --k) {
      line *= s[axis];
      kept[axis] = true;
    }
    visit(s, reduced_, [&](const Dims& index) {
      const float* x = in[0] + offset(index, from, s.rank);
      double sum = 0.0;
      visit(window, kept, [&](const Dims& i) {
        const float* part = x + offset(i, from, s.rank);
        for (int64_t k = 0; k < line; ++k) sum += part[k];
      });
      int64_t at = 0;
      for (int i = 0, o = 0; i < s.rank; ++i) {
        if (!reduced_[i]) {
          at += index[i] * to[o++];
        } else if (keepdims_) {
          ++o;
        }
      }
      out[at] = static_cast<float>(sum) / count;
    });
  }

 private:
  // Global pooling: each plane is added in order, four of them side by side.
  static void over_images(const Shape& s, const float* in, float* out, ThreadPool& pool) {
    constexpr int64_t kPlanes = 4;
    const int64_t size = s.inner(), planes = s[0] * s[1];
    pool.run(static_cast<size_t>((planes + kPlanes - 1) / kPlanes),
             static_cast<double>(planes * size) / kPerMicrosecond, [&](size_t item, int) {
               const int64_t first = static_cast<int64_t>(item) * kPlanes;
               const int64_t count = std::min(kPlanes, planes - first);
               double sum[kPlanes] = {};
               if (count == kPlanes) {
                 const float* const x = in + first * size;
                 for (int64_t i = 0; i < size; ++i) {
                   for (int64_t p = 0; p < kPlanes; ++p) sum[p] += x[p * size + i];
                 }
               } else {
                 for (int64_t p = 0; p < count; ++p) {
                   for (int64_t i = 0; i < size; ++i) sum[p] += in[(first + p) * size + i];
                 }
               }
               for (int64_t p = 0; p < count; ++p) {
                 out[first + p] = static_cast<float>(sum[p]) / static_cast<float>(size);
               }
             });
  }

  std::vector<bool> reduced_;
  bool keepdims_;
};

// A step that only moves values, on quantised ones.
template <class Move>
class ByteMoveStep : public Step {
 public:
  explicit ByteMoveStep(const Move& step) : step_(step) {}
  Shape infer(const Shapes& in) const override { return step_.infer(in); }
  std::string method(const Shapes&) const override { return "uint8"; }
  void run(const StepRun& r) const override {
    step_.move(r.shapes[0], r.bytes, r.out_shape, r.q[0].data);
  }

 private:
  Move step_;
};

template <class Move>
StepPtr byte_move(const Move& step) {
  return std::make_unique<ByteMoveStep<Move>>(step);
}

class ReshapeStep : public FloatStep {
 public:
  explicit ReshapeStep(std::vector<int64_t> shape) : shape_(std::move(shape)) {
    require(shape_.size() < kMaxRank, "reshape: more than 8 axes");
  }
  Shape infer(const Shapes& in) const override {
    Shape y{in[0].batch()};
    int64_t given = y.batch();  // elements without what is left for a size of -1
    for (int64_t d : shape_) given *= d < 0 ? 1 : d;
    for (int64_t d : shape_) y[y.rank++] = d < 0 && given > 0 ? in[0].size() / given : d;
    require(y.size() == in[0].size(), "reshape: % does not fit %", in[0], y);
    return y;
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool&) const override {
    move(shapes[0], in[0], y, out);
  }
  StepPtr on_bytes() const override { return byte_move(*this); }

  template <class T>
  static void move(const Shape& x, const T* in, const Shape& y, T* out) {
    if (plane_axis(x.rank) != 1 || plane_axis(y.rank) != 1) return move_axes(x, in, y, out);
    const int64_t n = x.batch(), each = x.size() / std::max<int64_t>(n, 1);
    const int64_t from = x.inner(), to = y.inner();
    if (from == to || n == 1) {
      std::copy(in, in + x.size(), out);
      return;
    }
    for (int64_t i = 0; i < each; ++i) {
      const T* source = in + i / from * n * from + i % from;
      T* target = out + i / to * n * to + i % to;
      for (int64_t j = 0; j < n; ++j) target[j * to] = source[j * from];
    }
  }

 private:
  // For any storage order: as a copy of axes that both shapes are made of where there are such
  // axes, as (12, 32) and (384) have, else element by element.
  template <class T>
  static void move_axes(const Shape& x, const T* in, const Shape& y, T* out) {
    const Dims from = storage_strides(x), to = storage_strides(y);
    Shape shared;
    Dims fs{}, ts{};
    Shape left_x = x, left_y = y;  // what is not yet in `shared`
    int i = x.rank - 1, o = y.rank - 1;
    while (shared.rank < kMaxRank) {
      while (i >= 0 && left_x[i] == 1) --i;
      while (o >= 0 && left_y[o] == 1) --o;
      if (i < 0 || o < 0) break;
      const int64_t size = std::min(left_x[i], left_y[o]);
      if (left_x[i] % size != 0 || left_y[o] % size != 0) break;
      shared[shared.rank] = size;  // the last axis comes first
      fs[shared.rank] = x[i] / left_x[i] * from[i];
      ts[shared.rank++] = y[o] / left_y[o] * to[o];
      left_x[i] /= size;
      left_y[o] /= size;
    }
    if (x.size() > 0 && i < 0 && o < 0) {
      std::reverse(shared.dims.begin(), shared.dims.begin() + shared.rank);
      std::reverse(fs.begin(), fs.begin() + shared.rank);
      std::reverse(ts.begin(), ts.begin() + shared.rank);
      return copy_strided(shared, in, fs, out, ts);
    }
    auto place = [](const Shape& s, const Dims& strides, int64_t index) {
      int64_t at = 0;
      for (int a = s.rank - 1; a >= 0; index /= s[a--]) at += index % s[a] * strides[a];
      return at;
    };
    for (int64_t e = 0; e < x.size(); ++e) out[place(y, to, e)] = in[place(x, from, e)];
  }

  std::vector<int64_t> shape_;
};

// A reshape whose sizes are numbers, or those of axes of the input: -a is the size of axis a.
class RegroupStep : public FloatStep {
 public:
  explicit RegroupStep(Sizes sizes) : sizes_(std::move(sizes)) {
    require(sizes_.size() < kMaxRank, "regroup: more than 8 axes");
  }
  Shape infer(const Shapes& in) const override {
    Shape y{in[0].batch()};
    for (const int64_t size : sizes_) {
      require(-size < in[0].rank, "regroup: % has no axis %", in[0], -size);
      y[y.rank++] = size < 0 ? in[0][static_cast<int>(-size)] : size;
    }
    require(y.size() == in[0].size(), "regroup: % does not fit %", in[0], y);
    return y;
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool&) const override {
    ReshapeStep::move(shapes[0], in[0], y, out);
  }

 private:
  Sizes sizes_;
};

class PadStep : public FloatStep {
 public:
  PadStep(Sizes pads, float value) : pads_(std::move(pads)), value_(value) {
    for (const int64_t pad : pads_) require(pad >= 0, "pad: a pad is negative");
  }
  Shape infer(const Shapes& in) const override {
    require(pads_.size() == 2 * static_cast<size_t>(in[0].rank),
            "pad: one pair per axis is needed");
    Shape y = in[0];
    for (int i = 0; i < y.rank; ++i) y[i] += pads_[2 * i] + pads_[2 * i + 1];
    return y;
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool&) const override {
    const Dims to = storage_strides(y);
    std::fill(out, out + y.size(), value_);
    int64_t at = 0;
    for (int i = 0; i < y.rank; ++i) at += pads_[2 * i] * to[i];
    copy_strided(shapes[0], in[0], storage_strides(shapes[0]), out + at, to);
  }

 private:
  Sizes pads_;  // before and after each axis
  float value_;
};

class SliceStep : public FloatStep {
 public:
  // A stop below 0 is counted from the end of the axis: -1 is the end.
  SliceStep(int axis, int64_t start, int64_t stop, int64_t step)
      : axis_(axis), start_(start), stop_(stop), step_(step) {
    require(axis > 0 && axis < kMaxRank && start >= 0 && (stop > start || stop < 0) && step > 0,
            "slice: it takes nothing");
  }
  Shape infer(const Shapes& in) const override {
    Shape y = in[0];
    require(axis_ < y.rank, "slice: no axis %", axis_);
    const int64_t stop = stop_ < 0 ? y[axis_] + 1 + stop_ : stop_;
    require(start_ < stop && stop <= y[axis_],
            "slice: nothing is left of axis %, or it ends outside %", axis_, in[0]);
    y[axis_] = (stop - start_ + step_ - 1) / step_;
    return y;
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool&) const override {
    move(shapes[0], in[0], y, out);
  }
  StepPtr on_bytes() const override { return byte_move(*this); }

  template <class T>
  void move(const Shape& x, const T* in, const Shape& y, T* out) const {
    Dims from = storage_strides(x);
    const T* const source = in + start_ * from[axis_];
    from[axis_] *= step_;
    copy_strided(y, source, from, out, storage_strides(y));
  }

 private:
  int axis_;
  int64_t start_, stop_, step_;
};

class ConcatStep : public FloatStep {
 public:
  explicit ConcatStep(int axis) : axis_(axis) {}
  Shape infer(const Shapes& in) const override {
    Shape y = in[0];
    require(axis_ > 0 && axis_ < y.rank, "concat: no axis %", axis_);
    for (size_t i = 1; i < in.size(); ++i) {
      Shape other = in[i];
      require(other.rank == y.rank, "concat: the ranks differ");
      y[axis_] += other[axis_];
      other[axis_] = y[axis_];
      require(other == y, "concat: the shapes do not fit each other");
    }
    return y;
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool&) const override {
    const Dims to = storage_strides(y);
    for (size_t i = 0; i < in.size(); ++i) {
      copy_strided(shapes[i], in[i], storage_strides(shapes[i]), out, to);
      out += shapes[i][axis_] * to[axis_];
    }
  }

 private:
  int axis_;
};

int add_limits(PlanBuilder& plan, const StepArgs& args, float low, float high) {
  return plan.add_step(elementwise_step(plan.kernels(), limits(plan.kernels(), low, high)),
                       args.inputs);
}

int add_relu(PlanBuilder& plan, const StepArgs& args) {
  return add_limits(plan, args, 0.0f, INFINITY);
}

int add_relu6(PlanBuilder& plan, const StepArgs& args) {
  return add_limits(plan, args, 0.0f, 6.0f);
}

// The largest float limits nothing: files hold no infinity.
int add_clamp(PlanBuilder& plan, const StepArgs& args) {
  constexpr double kNoLimit = std::numeric_limits<float>::max();
  const double low = args.number("low"), high = args.number("high");
  return add_limits(plan, args, low == -kNoLimit ? -INFINITY : static_cast<float>(low),
                    high == kNoLimit ? INFINITY : static_cast<float>(high));
}

// A line for each entry of an axis other than that of channels, which layers do not take over.
class LinesAlongAxis final : public BlockStep {
 public:
  LinesAlongAxis(const Kernels& kernels, ElementwisePtr lines, int axis)
      : BlockStep(kernels), lines_(std::move(lines)), axis_(axis) {}
  Shape infer(const Shapes& in) const override {
    const int64_t count = lines_->channels();  // 0: all have the same line
    require(axis_ >= 1 && axis_ < in[0].rank && (count == 0 || in[0][axis_] == count),
            "lines of % entries of axis % got the shape %", count, axis_, in[0]);
    return in[0];
  }
  void run(const StepRun& r) const override {
    in_blocks(r, [&](int64_t first, int64_t count, float* to) {
      lines_->apply(r.inputs[0] + first, static_cast<size_t>(count),
                    along(r.out_shape, axis_, first), to);
    });
  }

 private:
  ElementwisePtr lines_;
  int axis_;
};

int add_affine(PlanBuilder& plan, const StepArgs& args) {
  ElementwisePtr lines = affine(plan.kernels(), args.tensor<float>("scale", 1).values(),
                                args.tensor<float>("bias", 1).values());
  const int axis = args.attrs.count("axis") ? args.int32("axis") : 1;
  if (axis == 1) {
    return plan.add_step(elementwise_step(plan.kernels(), std::move(lines)), args.inputs);
  }
  return plan.add_step(std::make_unique<LinesAlongAxis>(plan.kernels(), std::move(lines), axis),
                       args.inputs);
}

int add_mean(PlanBuilder& plan, const StepArgs& args) {
  return add_step<MeanStep>(plan, args, args.int32s("axes"), args.flag("keepdims"));
}

// To the shape of the output, of which one size may be known at run time only.
int add_reshape(PlanBuilder& plan, const StepArgs& args) {
  Sizes sizes = args.output_shape;
  require(!sizes.empty(), "its output needs a batch axis");
  sizes.erase(sizes.begin());
  if (std::count(sizes.begin(), sizes.end(), -1) > 1) {
    std::string text = "(N";
    for (const int64_t size : sizes) text += size < 0 ? ", ?" : ", " + std::to_string(size);
    require(false,
            "its output has the shape %), but only one size of it may be known at run time only",
            text);
  }
  return add_step<ReshapeStep>(plan, args, std::move(sizes));
}

int add_regroup(PlanBuilder& plan, const StepArgs& args) {
  return add_step<RegroupStep>(plan, args, args.integers("sizes"));
}

int add_pad(PlanBuilder& plan, const StepArgs& args) {
  return add_step<PadStep>(plan, args, args.integers("pads"), args.float32("value"));
}

int add_slice(PlanBuilder& plan, const StepArgs& args) {
  constexpr int64_t kToTheEnd = std::numeric_limits<int32_t>::max();
  const int64_t stop = args.integer("stop");
  return add_step<SliceStep>(plan, args, args.int32("axis"), args.integer("start"),
                             stop == kToTheEnd ? -1 : stop, args.integer("step"));
}

int add_trim(PlanBuilder& plan, const StepArgs& args) {
  return add_step<SliceStep>(plan, args, args.int32("axis"), args.integer("first"),
                             -1 - args.integer("last"), args.integer("step"));
}

int add_concat(PlanBuilder& plan, const StepArgs& args) {
  return add_step<ConcatStep>(plan, args, args.int32("axis"));
}

}  // namespace

void basic_ops(OpRegistry& r) {
  r.add("relu", {.build = add_relu});
  r.add("relu6", {.build = add_relu6});
  r.add("clamp", {.build = add_clamp});
  r.add("affine", {.build = add_affine});
  r.add("mean", {.build = add_mean});
  r.add("flatten", {.build = add_reshape});
  r.add("reshape", {.build = add_reshape});
  r.add("regroup", {.build = add_regroup});
  r.add("pad", {.build = add_pad});
  r.add("slice", {.build = add_slice});
  r.add("trim", {.build = add_trim});
  r.add("concat", {.build = add_concat, .most = kAnyInputs});
}

}  // namespace lutra
