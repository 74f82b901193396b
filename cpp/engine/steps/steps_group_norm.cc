// Group norm, of which instance norm is the case of one channel in each group.
#include <algorithm>
#include <cmath>

#include "engine/core/op_registry.h"

namespace lutra {
namespace {

constexpr double kPerMicrosecond = 1e3;  // elements, a rough guess for one core
constexpr int64_t kLanes = 8;            // sums side by side, which become vector code

// x (N, C, ...) -> the same shape. For the C / groups channels of a group, in one sample:
//   d = x - x[0], in float64;  mean = sum(d) / n;  power = sum(d d) / n - mean^2 + eps
//   y = (x - float32(x[0] + mean)) float32(weight[c] / sqrt(power)) + bias[c]
// Entry s of a channel is added to the sum s mod 8, channel after channel.
class GroupNormStep : public FloatStep {
 public:
  GroupNormStep(int64_t groups, float eps, std::vector<float> weight, std::vector<float> bias)
      : groups_(groups), eps_(eps), weight_(std::move(weight)), bias_(std::move(bias)) {
    require(weight_.size() == bias_.size(), "group_norm: weight and bias differ in length");
    require(groups >= 1 && channels() % groups == 0,
            "group_norm: % groups do not divide % channels", groups, channels());
  }

  Shape infer(const Shapes& in) const override {
    require(in[0].rank >= 2 && in[0][1] == channels(), "group_norm over % channels got %",
            channels(), in[0]);
    return in[0];
  }
  size_t parameter_bytes() const override {
    return (weight_.size() + bias_.size()) * sizeof(float);
  }

 protected:
  void run(const Shapes& shapes, const std::vector<const float*>& in, const Shape&, float* out,
           uint8_t*, ThreadPool& pool) const override {
    const Shape& x = shapes[0];
    if (x.size() == 0) return;
    const Dims strides = storage_strides(x);
    // Behind the channels all axes are one in memory: the last ones, or for rank 3 the planes.
    const Channel channel{.size = x.inner(), .step = x.rank == 3 ? strides[2] : 1};
    const int64_t each = channels() / groups_;
    pool.run(static_cast<size_t>(x[0] * groups_), static_cast<double>(x.size()) / kPerMicrosecond,
             [&](size_t item, int) {
               const int64_t n = static_cast<int64_t>(item) % x[0];
               const int64_t first = static_cast<int64_t>(item) / x[0] * each;
               const int64_t at = n * strides[0] + first * strides[1];
               normalize(in[0] + at, channel, strides[1], first, first + each, out + at);
             });
  }

 private:
  struct Channel {
    int64_t size, step;
  };

  int64_t channels() const { return static_cast<int64_t>(weight_.size()); }

  void normalize(const float* x, const Channel& channel, int64_t channel_step, int64_t first,
                 int64_t last, float* y) const {
    const double origin = static_cast<double>(x[0]);
    double sums[kLanes] = {}, squares[kLanes] = {};
    for (int64_t c = first; c < last; ++c) {
      add(x + (c - first) * channel_step, channel, origin, sums, squares);
    }
    double sum = 0.0, square = 0.0;
    for (int64_t k = 0; k < kLanes; ++k) {
      sum += sums[k];
      square += squares[k];
    }
    const double count = static_cast<double>((last - first) * channel.size);
    const double mean = sum / count;
    const double variance = std::max(square / count - mean * mean, 0.0);
    const double root = 1.0 / std::sqrt(variance + static_cast<double>(eps_));
    const float center = static_cast<float>(origin + mean);
    for (int64_t c = first; c < last; ++c) {
      const size_t i = static_cast<size_t>(c);
      const float scale = static_cast<float>(static_cast<double>(weight_[i]) * root);
      const int64_t at = (c - first) * channel_step;
      if (channel.step == 1) {
        for (int64_t s = 0; s < channel.size; ++s) {
          y[at + s] = (x[at + s] - center) * scale + bias_[i];
        }
        continue;
      }
      for (int64_t s = 0; s < channel.size; ++s) {
        const int64_t k = at + s * channel.step;
        y[k] = (x[k] - center) * scale + bias_[i];
      }
    }
  }

  static void add(const float* x, const Channel& channel, double origin, double* sums,
                  double* squares) {
    const auto add_one = [&](int64_t s, int64_t k) {
      const double d = static_cast<double>(x[s * channel.step]) - origin;
      sums[k] += d;
      squares[k] += d * d;
    };
    int64_t s = 0;
    if (channel.step == 1) {
      for (; s + kLanes <= channel.size; s += kLanes) {
        for (int64_t k = 0; k < kLanes; ++k) {
          const double d = static_cast<double>(x[s + k]) - origin;
          sums[k] += d;
          squares[k] += d * d;
        }
      }
    }
    for (; s < channel.size; ++s) add_one(s, s % kLanes);
  }

  int64_t groups_;
  float eps_;
  std::vector<float> weight_, bias_;
};

int add_group_norm(PlanBuilder& plan, const StepArgs& args) {
  return add_step<GroupNormStep>(plan, args, args.integer("groups"), args.float32("eps"),
                                 args.tensor<float>("weight", 1).values(),
                                 args.tensor<float>("bias", 1).values());
}

}  // namespace

void group_norm_ops(OpRegistry& r) { r.add("group_norm", {.build = add_group_norm}); }

}  // namespace lutra
