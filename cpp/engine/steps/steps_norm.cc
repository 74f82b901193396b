// Norms and softmax.
#include <algorithm>

#include "engine/core/memory.h"
#include "engine/core/op_registry.h"
#include "engine/steps/function_tables.h"

namespace lutra {
namespace {

constexpr double kPerMicrosecond = 1e3;  // elements, a rough guess for one core
constexpr int64_t kTile = 64;            // rows of a work item

size_t items(int64_t rows) { return static_cast<size_t>((rows + kTile - 1) / kTile); }

// Rows of `width` values one after the other <-> planes of `rows` values, kTile apart.
void to_planes(const float* from, int64_t rows, int64_t width, float* to) {
  copy_strided(Shape{rows, width}, from, Dims{width, 1}, to, Dims{1, kTile});
}
void from_planes(const float* from, int64_t rows, int64_t width, float* to) {
  copy_strided(Shape{rows, width}, from, Dims{1, kTile}, to, Dims{width, 1});
}

// Over the last axis, of the length of `weight`. A mean is taken off only with `center`; `bias` may
// be empty.
//
// The features are planes where the rank is 2 or 3; else a row is consecutive in memory, and is
// turned into planes and back.
class NormStep : public Step {
 public:
  NormStep(const Kernels& kernels, bool center, std::vector<float> weight, std::vector<float> bias,
           float eps, LineTable rsqrt)
      : kernels_(kernels),
        name_(center ? "layer_norm" : "rms_norm"),
        center_(center),
        weight_(std::move(weight)),
        bias_(std::move(bias)),
        eps_(eps),
        rsqrt_(std::move(rsqrt)) {}

  Shape infer(const Shapes& in) const override {
    require(in[0].rank >= 2 && in[0][in[0].rank - 1] == width(), "% over % features got %", name_,
            width(), in[0]);
    return in[0];
  }
  int max_quantized() const override { return kMaxQuantized; }
  std::string method(const Shapes&) const override {
    return rsqrt_.empty() ? "float32" : "table of " + std::to_string(rsqrt_.slope.size());
  }
  size_t parameter_bytes() const override {
    return (weight_.size() + bias_.size()) * sizeof(float) + rsqrt_.bytes();
  }
  size_t workspace(const Shapes& in, int threads) const override {
    return in[0].rank <= 3 ? 0 : static_cast<size_t>(threads) * block_bytes();
  }

  void run(const StepRun& r) const override {
    const Norm norm{.width = static_cast<int32_t>(width()),
                    .center = center_,
                    .eps = eps_,
                    .weight = weight_.data(),
                    .bias = bias_.empty() ? nullptr : bias_.data(),
                    .rsqrt = rsqrt_.segments()};
    const int64_t rows = r.out_shape.size() / std::max<int64_t>(width(), 1);
    const double time = static_cast<double>(r.out_shape.size()) / kPerMicrosecond;
    r.pool.run(items(rows), time, [&](size_t item, int worker) {
      const int64_t first = static_cast<int64_t>(item) * kTile;
      const int64_t count = std::min(kTile, rows - first);
      if (r.out_shape.rank <= 3) {
        planes(r, norm, rows, first, count);
      } else {
        lines(r, norm, first, count, r.workspace + static_cast<size_t>(worker) * block_bytes());
      }
    });
  }

 private:
  int64_t width() const { return static_cast<int64_t>(weight_.size()); }
  size_t block_bytes() const {
    return align64(static_cast<size_t>(2 * kTile * width()) * sizeof(float));
  }

  void planes(const StepRun& r, const Norm& norm, int64_t rows, int64_t first,
              int64_t count) const {
    const size_t stride = static_cast<size_t>(rows);
    PlaneOutput out{.out = r.out ? r.out + first : nullptr,
                    .stride = stride,
                    .quantized = r.quantized,
                    .q = {}};
    for (int i = 0; i < r.quantized; ++i) {
      out.q[i] = {.grid = r.q[i].grid, .out = r.q[i].data + first, .stride = stride};
    }
    kernels_.norm(norm, r.inputs[0] + first, stride, static_cast<size_t>(count), out);
  }

  void lines(const StepRun& r, const Norm& norm, int64_t first, int64_t count,
             uint8_t* memory) const {
    float* const x = reinterpret_cast<float*>(memory);
    float* const y = x + kTile * width();
    to_planes(r.inputs[0] + first * width(), count, width(), x);
    const PlaneOutput out{.out = y, .stride = kTile, .quantized = 0, .q = {}};
    kernels_.norm(norm, x, kTile, static_cast<size_t>(count), out);
    float* const to = r.out ? r.out + first * width() : x;
    from_planes(y, count, width(), to);
    for (int i = 0; i < r.quantized; ++i) {
      kernels_.quantize(to, static_cast<size_t>(count * width()), r.q[i].grid,
                        r.q[i].data + first * width());
    }
  }

  const Kernels& kernels_;
  const char* name_;
  bool center_;
  std::vector<float> weight_, bias_;
  float eps_;
  LineTable rsqrt_;
};

class SoftmaxStep : public FloatStep {
 public:
  SoftmaxStep(const Kernels& kernels, int axis, LineTable exp, LineTable reciprocal)
      : kernels_(kernels), axis_(axis), exp_(std::move(exp)), reciprocal_(std::move(reciprocal)) {}

  Shape infer(const Shapes& in) const override {
    require(axis_ > 0 && axis_ < in[0].rank, "softmax: no axis %", axis_);
    return in[0];
  }
  std::string method(const Shapes&) const override {
    return exp_.empty() ? "float32" : "table of " + std::to_string(exp_.slope.size());
  }
  size_t parameter_bytes() const override { return exp_.bytes() + reciprocal_.bytes(); }
  size_t workspace(const Shapes& in, int threads) const override {
    return static_cast<size_t>(threads) * block_bytes(in[0]);
  }

 protected:
  // In memory the value is (outer, n, inner).
  void run(const Shapes& shapes, const std::vector<const float*>& in, const Shape&, float* out,
           uint8_t* memory, ThreadPool& pool) const override {
    const Shape& s = shapes[0];
    if (s.size() == 0) return;
    const int64_t n = s[axis_], inner = storage_strides(s)[axis_], outer = s.size() / (n * inner);
    const Softmax softmax{.count = static_cast<int32_t>(n),
                          .exp = exp_.segments(),
                          .reciprocal = reciprocal_.segments()};
    const double time = 4 * static_cast<double>(s.size()) / kPerMicrosecond;
    if (inner >= kFewRows) {
      const size_t each = items(inner);
      pool.run(static_cast<size_t>(outer) * each, time, [&](size_t item, int) {
        const int64_t first = static_cast<int64_t>(item % each) * kTile;
        const int64_t at = static_cast<int64_t>(item / each) * n * inner + first;
        kernels_.softmax(softmax, in[0] + at, static_cast<size_t>(inner),
                         static_cast<size_t>(std::min(kTile, inner - first)), out + at);
      });
      return;
    }
    const int64_t rows = outer * inner;
    pool.run(items(rows), time, [&](size_t item, int worker) {
      float* const block =
          reinterpret_cast<float*>(memory + static_cast<size_t>(worker) * block_bytes(s));
      const int64_t first = static_cast<int64_t>(item) * kTile;
      const int64_t count = std::min(kTile, rows - first);
      const auto at = [&](int64_t r) { return r / inner * n * inner + r % inner; };
      if (inner == 1) {
        to_planes(in[0] + first * n, count, n, block);
      } else {
        for (int64_t r = 0; r < count; ++r) {
          const float* const x = in[0] + at(first + r);
          for (int64_t j = 0; j < n; ++j) block[j * kTile + r] = x[j * inner];
        }
      }
      kernels_.softmax(softmax, block, kTile, static_cast<size_t>(count), block);
      if (inner == 1) return from_planes(block, count, n, out + first * n);
      for (int64_t r = 0; r < count; ++r) {
        float* const y = out + at(first + r);
        for (int64_t j = 0; j < n; ++j) y[j * inner] = block[j * kTile + r];
      }
    });
  }

 private:
  static constexpr int64_t kFewRows = 8;  // of fewer, several are put side by side

  size_t block_bytes(const Shape& s) const {
    if (storage_strides(s)[axis_] >= kFewRows) return 0;
    return align64(static_cast<size_t>(s[axis_] * kTile) * sizeof(float));
  }

  const Kernels& kernels_;
  int axis_;
  LineTable exp_, reciprocal_;
};

int add_layer_norm(PlanBuilder& plan, const StepArgs& args) {
  std::vector<float> weight = args.tensor<float>("weight", 1).values();
  std::vector<float> bias = args.tensor<float>("bias", 1).values();
  require(weight.size() == bias.size(), "layer_norm: weight and bias differ in length");
  return add_step<NormStep>(plan, args, plan.kernels(), true, std::move(weight), std::move(bias),
                            args.float32("eps"), line_table(args, "rsqrt"));
}

int add_rms_norm(PlanBuilder& plan, const StepArgs& args) {
  return add_step<NormStep>(plan, args, plan.kernels(), false,
                            args.tensor<float>("weight", 1).values(), std::vector<float>(),
                            args.float32("eps"), line_table(args, "rsqrt"));
}

int add_softmax(PlanBuilder& plan, const StepArgs& args) {
  auto [exp, reciprocal] = exp_tables(args);
  return add_step<SoftmaxStep>(plan, args, plan.kernels(), args.int32("axis"), std::move(exp),
                               std::move(reciprocal));
}

}  // namespace

void norm_ops(OpRegistry& r) {
  r.add("layer_norm", {.build = add_layer_norm});
  r.add("rms_norm", {.build = add_rms_norm});
  r.add("softmax", {.build = add_softmax});
}

}  // namespace lutra
