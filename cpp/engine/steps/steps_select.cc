// Steps that choose by value or by index: the largest entries, entries at computed indices, and at
// a place counted from the end.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/core/memory.h"
#include "engine/core/op_registry.h"

namespace lutra {
namespace {

using Inputs = std::vector<const float*>;

constexpr double kPerMicrosecond = 1e3;  // elements, a rough guess for one core

// An axis of a value, and the places of its first entries: the index of all other axes, in their
// order in memory.
struct Lines {
  Shape others;
  std::vector<int> axes;

  Lines(const Shape& x, int axis) {
    for (int k = 0; k < x.rank; ++k) {
      const int i = storage_axis(x.rank, k);
      if (i == axis) continue;
      axes.push_back(i);
      others[others.rank++] = x[i];
    }
  }
  int64_t count() const { return others.size(); }
  int64_t place(int64_t line, const Dims& strides) const {
    int64_t at = 0;
    for (int k = others.rank - 1; k >= 0; line /= others[k--]) {
      at += line % others[k] * strides[axes[static_cast<size_t>(k)]];
    }
    return at;
  }
};

// The k largest (or smallest) entries of an axis, the first first, or their indices as floats. Of
// equal ones the first comes first; NaN counts as the largest.
class TopkStep : public FloatStep {
 public:
  TopkStep(int64_t k, int axis, bool largest, bool indices)
      : k_(k), axis_(axis), largest_(largest), indices_(indices) {
    require(k >= 1, "topk: it takes nothing");
  }

  Shape infer(const Shapes& in) const override {
    Shape y = in[0];
    require(axis_ >= 1 && axis_ < y.rank, "topk: no axis % in %", axis_, y);
    require(k_ <= y[axis_], "topk of % entries got % on axis % of %", k_, y[axis_], axis_, y);
    y[axis_] = k_;
    return y;
  }
  size_t workspace(const Shapes& in, int threads) const override {
    return static_cast<size_t>(threads) * worker_bytes(in[0]);
  }

 protected:
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t* workspace,
           ThreadPool& pool) const override {
    const Shape& x = shapes[0];
    const Lines lines(x, axis_);
    const Dims from = storage_strides(x), to = storage_strides(y);
    const int64_t n = x[axis_];
    pool.run(static_cast<size_t>(lines.count()), static_cast<double>(x.size()) / kPerMicrosecond,
             [&](size_t item, int worker) {
               const int64_t line = static_cast<int64_t>(item);
               const float* const source = in[0] + lines.place(line, from);
               float* const target = out + lines.place(line, to);
               uint8_t* const memory = workspace + static_cast<size_t>(worker) * worker_bytes(x);
               float* const values = reinterpret_cast<float*>(memory);
               int32_t* const order = reinterpret_cast<int32_t*>(values + n);
               for (int64_t i = 0; i < n; ++i) values[i] = source[i * from[axis_]];
               std::iota(order, order + n, 0);
               std::partial_sort(order, order + k_, order + n, [&](int32_t a, int32_t b) {
                 const float u = values[a], v = values[b];
                 if (before(u, v)) return true;
                 return !before(v, u) && a < b;
               });
               for (int64_t i = 0; i < k_; ++i) {
                 target[i * to[axis_]] = indices_ ? static_cast<float>(order[i]) : values[order[i]];
               }
             });
  }

 private:
  size_t worker_bytes(const Shape& x) const {
    return align64(static_cast<size_t>(x[axis_]) * (sizeof(float) + sizeof(int32_t)));
  }
  bool before(float u, float v) const {
    if (!largest_) std::swap(u, v);
    return u > v || (std::isnan(u) && !std::isnan(v));
  }

  int64_t k_;
  int axis_;
  bool largest_, indices_;
};

// y[.., i, ..] = x[.., index[.., i, ..], ..] along an axis; sizes of 1 of the index are repeated on
// the other axes. run() throws std::invalid_argument for an index that is not an entry's.
class TakeAlongStep : public FloatStep {
 public:
  explicit TakeAlongStep(int axis) : axis_(axis) {}

  Shape infer(const Shapes& in) const override {
    const Shape &x = in[0], &index = in[1];
    const std::string shapes = x.text() + " by " + index.text();
    require(x.rank == index.rank && axis_ >= 1 && axis_ < x.rank,
            "take_along of % on axis %: both must have that axis, and the same rank", shapes,
            axis_);
    Shape y = x;
    y[axis_] = index[axis_];
    for (int i = 0; i < x.rank; ++i) {
      require(i == axis_ || index[i] == x[i] || (i > 0 && index[i] == 1),
              "take_along of %: axis % of the index must be equal or 1", shapes, i);
    }
    return y;
  }

 protected:
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool& pool) const override {
    const Shape &x = shapes[0], &index = shapes[1];
    const Lines lines(y, axis_);
    const Dims from = storage_strides(x), to = storage_strides(y);
    Dims by = storage_strides(index);
    for (int i = 0; i < index.rank; ++i) {
      if (i != axis_ && index[i] == 1) by[i] = 0;
    }
    pool.run(static_cast<size_t>(lines.count()), static_cast<double>(y.size()) / kPerMicrosecond,
             [&](size_t item, int) {
               const int64_t line = static_cast<int64_t>(item);
               const float* const source = in[0] + lines.place(line, from);
               const float* const order = in[1] + lines.place(line, by);
               float* const target = out + lines.place(line, to);
               for (int64_t i = 0; i < y[axis_]; ++i) {
                 const float k = order[i * by[axis_]];
                 if (!(k >= 0.0f && k < static_cast<float>(x[axis_]))) refuse(k, x);
                 target[i * to[axis_]] = source[static_cast<int64_t>(k) * from[axis_]];
               }
             });
  }

 private:
  [[noreturn]] void refuse(float k, const Shape& x) const {
    if (!(std::fabs(k) < 0x1p62f)) {
      fail("take_along: an index that is no whole number is outside axis % of %", {axis_, x});
    }
    fail("take_along: the index % is outside axis % of %",
         {static_cast<int64_t>(std::floor(k)), axis_, x});
  }

  int axis_;
};

// The entry of an axis that is `back` entries before its end, without the axis.
class FromEndStep : public FloatStep {
 public:
  FromEndStep(int axis, int64_t back) : axis_(axis), back_(back) {}

  Shape infer(const Shapes& in) const override {
    const Shape& x = in[0];
    require(axis_ >= 1 && axis_ < x.rank && back_ >= 1 && back_ <= x[axis_],
            "from_end: axis % of % has no entry % from its end", axis_, x, back_);
    Shape y;
    for (int i = 0; i < x.rank; ++i) {
      if (i != axis_) y[y.rank++] = x[i];
    }
    return y;
  }

 protected:
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool&) const override {
    const Shape& x = shapes[0];
    const Dims strides = storage_strides(x);
    Dims from{};
    for (int i = 0, o = 0; i < x.rank; ++i) {
      if (i != axis_) from[o++] = strides[i];
    }
    copy_strided(y, in[0] + (x[axis_] - back_) * strides[axis_], from, out, storage_strides(y));
  }

 private:
  int axis_;
  int64_t back_;
};

// An axis from its end to its beginning.
class FlipStep : public FloatStep {
 public:
  explicit FlipStep(int axis) : axis_(axis) {}

  Shape infer(const Shapes& in) const override {
    require(axis_ >= 1 && axis_ < in[0].rank, "flip: % has no axis %", in[0], axis_);
    return in[0];
  }

 protected:
  void run(const Shapes&, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool&) const override {
    Dims from = storage_strides(y);
    const float* const last = in[0] + (y[axis_] - 1) * from[axis_];
    from[axis_] = -from[axis_];
    copy_strided(y, last, from, out, storage_strides(y));
  }

 private:
  int axis_;
};

int add_flip(PlanBuilder& plan, const StepArgs& args) {
  return add_step<FlipStep>(plan, args, args.int32("axis"));
}

int add_topk(PlanBuilder& plan, const StepArgs& args) {
  return add_step<TopkStep>(plan, args, args.integer("k"), args.int32("axis"), args.flag("largest"),
                            args.flag("indices"));
}

int add_take_along(PlanBuilder& plan, const StepArgs& args) {
  return add_step<TakeAlongStep>(plan, args, args.int32("axis"));
}

int add_from_end(PlanBuilder& plan, const StepArgs& args) {
  return add_step<FromEndStep>(plan, args, args.int32("axis"), args.integer("back"));
}

}  // namespace

void select_ops(OpRegistry& r) {
  r.add("topk", {.build = add_topk});
  r.add("take_along", {.build = add_take_along, .inputs = 2});
  r.add("flip", {.build = add_flip});
  r.add("from_end", {.build = add_from_end});
}

}  // namespace lutra
