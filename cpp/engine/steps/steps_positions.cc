// Steps that depend on the positions of tokens: rotary embeddings, biases of relative positions.
#include <algorithm>
#include <vector>

#include "engine/core/op_registry.h"
#include "engine/steps/starts.h"

namespace lutra {
namespace {

using Inputs = std::vector<const float*>;

constexpr double kPerMicrosecond = 1e3;  // elements, a rough guess for one core

// x (N, T, H d) and perhaps start (N) of integers -> the shape of x; cos and sin (length, d), of
// which the rows start[n].. are used, or the first T. In each head the features a < d / 2 and b = a
// + d / 2 (or 2 a and 2 a + 1, interleaved) are turned:
//   y[a] = x[a] cos[t, a] - x[b] sin[t, a];  y[b] = x[b] cos[t, b] + x[a] sin[t, b]
class RotaryStep : public FloatStep {
 public:
  RotaryStep(int64_t heads, bool interleaved, const Tensor<float>& cos, const Tensor<float>& sin)
      : heads_(heads), interleaved_(interleaved), length_(cos[0]), width_(cos[1]) {
    require(heads >= 1 && width_ % 2 == 0 && cos.shape == sin.shape,
            "rotary: cos and sin must have the same shape, with an even number of columns");
    for (const auto& [from, to] : {std::pair(cos.data, &cos_), std::pair(sin.data, &sin_)}) {
      to->resize(static_cast<size_t>(length_ * width_));
      copy_strided(Shape{width_, length_}, from, {1, width_}, to->data(), {length_, 1});
    }
  }

  bool reads_integers(size_t input) const override { return input == 1; }
  Shape infer(const Shapes& in) const override {
    const Shape& x = in[0];
    require(in.size() == 1 || in[1] == Shape({x[0]}),
            "rotary got the shape % and starts that are not (N)", x);
    require(x.rank == 3 && x[2] == heads_ * width_,
            "rotary of % heads of % features got the shape %", heads_, width_, x);
    require(x[1] <= length_,
            "sequences of % are too long; the longest that its table has positions for is %", x[1],
            length_);
    return x;
  }
  size_t parameter_bytes() const override { return (cos_.size() + sin_.size()) * sizeof(float); }

 protected:
  void run(const Shapes& shapes, const Inputs& in, const Shape&, float* out, uint8_t*,
           ThreadPool& pool) const override {
    const int64_t batch = shapes[0][0], length = shapes[0][1], half = width_ / 2;
    const int64_t plane = batch * length;
    const int32_t* const start = in.size() > 1 ? integers_of(in[1]) : nullptr;
    if (start) check_starts(start, batch, length, length_);
    pool.run(static_cast<size_t>(heads_ * half),
             static_cast<double>(shapes[0].size()) / kPerMicrosecond, [&](size_t item, int) {
               const int64_t k = static_cast<int64_t>(item) % half;
               const int64_t head = static_cast<int64_t>(item) / half * width_;
               const int64_t a = interleaved_ ? 2 * k : k;
               const int64_t b = interleaved_ ? a + 1 : a + half;
               const float *const cos_a = cos_.data() + a * length_, *const sin_a =
                                                                         sin_.data() + a * length_;
               const float *const cos_b = cos_.data() + b * length_, *const sin_b =
                                                                         sin_.data() + b * length_;
               for (int64_t n = 0; n < batch; ++n) {
                 const int64_t at_a = (head + a) * plane + n * length;
                 const int64_t at_b = (head + b) * plane + n * length;
                 const float *const xa = in[0] + at_a, *const xb = in[0] + at_b;
                 float *const ya = out + at_a, *const yb = out + at_b;
                 const int64_t s = start ? start[n] : 0;
                 for (int64_t t = 0; t < length; ++t) {
                   const float u = xa[t], v = xb[t];
                   ya[t] = u * cos_a[s + t] - v * sin_a[s + t];
                   yb[t] = v * cos_b[s + t] + u * sin_b[s + t];
                 }
               }
             });
  }

 private:
  int64_t heads_;
  bool interleaved_;
  int64_t length_, width_;
  std::vector<float> cos_, sin_;  // (width, length)
};

// Scores (N, H, T, S) + weight[h, j - i + length - 1] at (i, j); weight (H, 2 length - 1)
class RelativeBiasStep : public FloatStep {
 public:
  explicit RelativeBiasStep(const Tensor<float>& weight)
      : heads_(weight[0]), length_((weight[1] + 1) / 2), weight_(weight.values()) {
    require(weight[1] % 2 == 1, "relative_bias: the distances of its table must be odd in number");
  }

  Shape infer(const Shapes& in) const override {
    const Shape& x = in[0];
    require(x.rank == 4 && x[1] == heads_, "relative_bias of % heads got the shape %", heads_, x);
    require(x[2] <= length_ && x[3] <= length_,
            "scores of % are too long; the longest that its table has distances for is %", x,
            length_);
    return x;
  }
  size_t parameter_bytes() const override { return weight_.size() * sizeof(float); }

 protected:
  void run(const Shapes& shapes, const Inputs& in, const Shape&, float* out, uint8_t*,
           ThreadPool& pool) const override {
    const Shape& x = shapes[0];
    const int64_t queries = x[2], keys = x[3];
    pool.run(static_cast<size_t>(x[0] * x[1]), static_cast<double>(x.size()) / kPerMicrosecond,
             [&](size_t item, int) {
               const int64_t plane = static_cast<int64_t>(item);  // head after head
               const float* const w =
                   weight_.data() + plane / x[0] * (2 * length_ - 1) + length_ - 1;
               for (int64_t i = 0; i < queries; ++i) {
                 const int64_t at = (plane * queries + i) * keys;
                 for (int64_t j = 0; j < keys; ++j) out[at + j] = in[0][at + j] + w[j - i];
               }
             });
  }

 private:
  int64_t heads_, length_;
  std::vector<float> weight_;
};

int add_rotary(PlanBuilder& plan, const StepArgs& args) {
  return add_step<RotaryStep>(plan, args, args.integer("heads"), args.flag("interleaved"),
                              args.tensor<float>("cos", 2), args.tensor<float>("sin", 2));
}

int add_relative_bias(PlanBuilder& plan, const StepArgs& args) {
  return add_step<RelativeBiasStep>(plan, args, args.tensor<float>("weight", 2));
}

}  // namespace

void position_ops(OpRegistry& r) {
  r.add("rotary", {.build = add_rotary, .inputs = 1, .most = 2});
  r.add("relative_bias", {.build = add_relative_bias});
}

}  // namespace lutra
