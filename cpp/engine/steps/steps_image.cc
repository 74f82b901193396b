// Steps that give images another size.
#include <algorithm>
#include <cmath>

#include "engine/core/op_registry.h"
#include "engine/steps/scaled.h"

namespace lutra {
namespace {

enum class Upsample { kNearest, kNearestExact, kBilinear };

// The size of the output is given, or by scales, or it is that of the second input.
struct Upsampling {
  Upsample mode;
  int64_t height = 0, width = 0;        // 0: not given
  double scale_h = 0.0, scale_w = 0.0;  // 0: not given
  bool align_corners = false;
  bool like = false;
};

using Inputs = std::vector<const float*>;

constexpr double kPerMicrosecond = 1e3;  // elements, a rough guess for one core
constexpr int64_t kBlock = 16384;        // elements per work item

// to[i * factor + k] = from[k * step + i], i < count. With the factor as a constant the compiler
// makes vector code of it.
template <int64_t kFactor, class T>
void interleave(const T* from, int64_t step, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t k = 0; k < kFactor; ++k) to[i * kFactor + k] = from[k * step + i];
  }
}

template <class T>
void interleave(const T* from, int64_t step, int64_t count, int64_t factor, T* to) {
  switch (factor) {
    case 2:
      return interleave<2>(from, step, count, to);
    case 3:
      return interleave<3>(from, step, count, to);
    case 4:
      return interleave<4>(from, step, count, to);
    default:
      for (int64_t k = 0; k < factor; ++k) {
        for (int64_t i = 0; i < count; ++i) to[i * factor + k] = from[k * step + i];
      }
  }
}

// Every `factor`^2 channels become a channel of `factor` times the height and width.
class PixelShuffleStep : public FloatStep {
 public:
  explicit PixelShuffleStep(int64_t factor) : factor_(factor) {
    require(factor >= 1, "pixel_shuffle: the factor must be at least 1");
  }
  Shape infer(const Shapes& in) const override {
    const Shape& x = in[0];
    require(x.rank == 4 && x[1] % (factor_ * factor_) == 0, "a pixel shuffle by % got the shape %",
            factor_, x);
    return {x[0], x[1] / (factor_ * factor_), x[2] * factor_, x[3] * factor_};
  }
  StepPtr on_bytes() const override;
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool& pool) const override {
    shuffle(shapes[0], in[0], y, out, pool);
  }

  template <class T>
  void shuffle(const Shape& x, const T* in, const Shape& y, T* out, ThreadPool& pool) const {
    const int64_t channel = x[0] * x[2] * x[3];  // elements of a channel of x, of all images
    const int64_t lines = y[1] * y[0] * y[2];    // of y, in the order of its memory
    const int64_t block = std::max<int64_t>(1, kBlock / std::max<int64_t>(y[3], 1));
    pool.run(static_cast<size_t>((lines + block - 1) / block),
             static_cast<double>(y.size()) / kPerMicrosecond, [&](size_t item, int) {
               const int64_t first = static_cast<int64_t>(item) * block;
               const int64_t last = std::min(lines, first + block);
               for (int64_t line = first; line < last; ++line) {
                 const int64_t row = line % y[2], image = line / y[2] % y[0],
                               c = line / y[2] / y[0];
                 const int64_t source = c * factor_ * factor_ + row % factor_ * factor_;
                 const int64_t at = source * channel + (image * x[2] + row / factor_) * x[3];
                 interleave(in + at, channel, x[3], factor_, out + line * y[3]);
               }
             });
  }

 private:
  int64_t factor_;
};

class BytePixelShuffleStep : public Step {
 public:
  explicit BytePixelShuffleStep(const PixelShuffleStep& step) : step_(step) {}
  Shape infer(const Shapes& in) const override { return step_.infer(in); }
  std::string method(const Shapes&) const override { return "uint8"; }
  void run(const StepRun& r) const override {
    step_.shuffle(r.shapes[0], r.bytes, r.out_shape, r.q[0].data, r.pool);
  }

 private:
  PixelShuffleStep step_;
};

StepPtr PixelShuffleStep::on_bytes() const { return std::make_unique<BytePixelShuffleStep>(*this); }

// Which two entries of an axis each result is made of, and the weight of the second.
struct Positions {
  std::vector<int32_t> first, second;
  std::vector<float> weight;
};

// One axis of n entries that becomes m; see the operator's specification for the equations.
Positions positions(const Upsampling& u, int64_t n, int64_t m, double scale) {
  float step = 0.0f;
  if (u.align_corners) {
    if (m > 1) step = static_cast<float>(n - 1) / static_cast<float>(m - 1);
  } else if (scale > 0) {
    step = static_cast<float>(1.0 / scale);
  } else {
    step = static_cast<float>(n) / static_cast<float>(m);
  }
  Positions p;
  for (int64_t k = 0; k < m; ++k) {
    const float j = static_cast<float>(k);
    float s = j * step;
    if (u.mode == Upsample::kNearestExact) {
      s = (j + 0.5f) * step;
    } else if (n == m) {
      s = j;
    } else if (u.mode == Upsample::kNearest && m == 2 * n) {
      s = j * 0.5f;
    } else if (u.mode == Upsample::kBilinear && !u.align_corners) {
      s = std::max((j + 0.5f) * step - 0.5f, 0.0f);
    }
    const int64_t i = std::min(static_cast<int64_t>(std::floor(s)), n - 1);
    p.first.push_back(static_cast<int32_t>(i));
    p.second.push_back(static_cast<int32_t>(std::min(i + 1, n - 1)));
    p.weight.push_back(std::min(s - static_cast<float>(i), 1.0f));
  }
  return p;
}

class UpsampleStep : public FloatStep {
 public:
  explicit UpsampleStep(const Upsampling& u) : u_(u) {}

  Shape infer(const Shapes& in) const override {
    const Shape& x = in[0];
    require(x.rank == 4, "an upsampling got the shape %", x);
    Shape y = x;
    if (u_.like) {
      require(in[1].rank == 4, "an upsampling got the shape %", in[1]);
      y[2] = in[1][2];
      y[3] = in[1][3];
    } else if (u_.height > 0) {
      y[2] = u_.height;
      y[3] = u_.width;
    } else {
      y[2] = static_cast<int64_t>(std::floor(static_cast<double>(x[2]) * u_.scale_h));
      y[3] = static_cast<int64_t>(std::floor(static_cast<double>(x[3]) * u_.scale_w));
    }
    require(y[2] > 0 && y[3] > 0, "an upsampling leaves nothing of %", x);
    return y;
  }

  // Two lines of results for every worker.
  size_t workspace(const Shapes& in, int threads) const override {
    const size_t line = static_cast<size_t>(infer(in)[3]) * sizeof(float);
    return u_.mode == Upsample::kBilinear ? 2 * line * static_cast<size_t>(threads) : 0;
  }

  StepPtr on_bytes() const override;
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t* workspace,
           ThreadPool& pool) const override {
    if (u_.mode == Upsample::kBilinear) {
      bilinear(shapes[0], in[0], y, out, reinterpret_cast<float*>(workspace), pool);
    } else {
      nearest(shapes[0], in[0], y, out, pool);
    }
  }

  template <class T>
  void nearest(const Shape& x, const T* in, const Shape& y, T* out, ThreadPool& pool) const {
    const Positions rows = positions(u_, x[2], y[2], u_.scale_h);
    const Positions columns = positions(u_, x[3], y[3], u_.scale_w);
    bool twice = y[3] == 2 * x[3];  // which becomes vector code
    for (int64_t i = 0; i < y[3]; ++i) twice = twice && columns.first[i] == i / 2;
    over_lines(y, pool, [&](int64_t plane, int64_t first, int64_t last, int) {
      const T* const from = in + plane * x[2] * x[3];
      T* to = out + (plane * y[2] + first) * y[3];
      for (int64_t row = first; row < last; ++row, to += y[3]) {
        if (row > first && rows.first[row] == rows.first[row - 1]) {
          std::copy(to - y[3], to, to);
          continue;
        }
        const T* const line = from + rows.first[row] * x[3];
        if (twice) {
          for (int64_t i = 0; i < x[3]; ++i) to[2 * i] = to[2 * i + 1] = line[i];
        } else {
          for (int64_t i = 0; i < y[3]; ++i) to[i] = line[columns.first[i]];
        }
      }
    });
  }

 private:
  // Calls f(plane, first row, last row + 1, worker) for parts of every plane of y.
  template <class F>
  static void over_lines(const Shape& y, ThreadPool& pool, const F& f) {
    const int64_t block = std::max<int64_t>(1, kBlock / y[3]);
    const int64_t parts = (y[2] + block - 1) / block;
    pool.run(static_cast<size_t>(y[0] * y[1] * parts),
             static_cast<double>(y.size()) / kPerMicrosecond, [&](size_t item, int worker) {
               const int64_t first = static_cast<int64_t>(item) % parts * block;
               f(static_cast<int64_t>(item) / parts, first, std::min(y[2], first + block), worker);
             });
  }

  void bilinear(const Shape& x, const float* in, const Shape& y, float* out, float* workspace,
                ThreadPool& pool) const {
    const Positions rows = positions(u_, x[2], y[2], u_.scale_h);
    const Positions columns = positions(u_, x[3], y[3], u_.scale_w);
    const int64_t width = y[3];
    over_lines(y, pool, [&](int64_t plane, int64_t first, int64_t last, int worker) {
      const float* const from = in + plane * x[2] * x[3];
      // Lines of x at the columns of y, each made once: rows only go forward.
      float* const lines[2] = {workspace + 2 * worker * width,
                               workspace + (2 * worker + 1) * width};
      int64_t have[2] = {-1, -1};
      auto line = [&](int64_t row, int64_t other) {  // `other` must stay
        for (int64_t k = 0; k < 2; ++k) {
          if (have[k] == row) return k;
        }
        const int64_t k = have[0] == other ? 1 : 0;
        const float* const source = from + row * x[3];
        for (int64_t i = 0; i < width; ++i) {
          const float w = columns.weight[i];
          lines[k][i] = source[columns.first[i]] * (1.0f - w) + source[columns.second[i]] * w;
        }
        have[k] = row;
        return k;
      };
      for (int64_t row = first; row < last; ++row) {
        const int64_t a = line(rows.first[row], rows.second[row]);
        const int64_t b = line(rows.second[row], rows.first[row]);
        const float *const upper = lines[a], *const lower = lines[b];
        const float w = rows.weight[row], v = 1.0f - w;
        float* const to = out + (plane * y[2] + row) * width;
        for (int64_t i = 0; i < width; ++i) to[i] = upper[i] * v + lower[i] * w;
      }
    });
  }

  Upsampling u_;
};

// Of integers on a grid: the nearest value is chosen, so that they can be chosen from as well.
class ByteUpsampleStep : public Step {
 public:
  explicit ByteUpsampleStep(const UpsampleStep& step) : step_(step) {}
  Shape infer(const Shapes& in) const override { return step_.infer(in); }
  std::string method(const Shapes&) const override { return "uint8"; }
  void run(const StepRun& r) const override {
    step_.nearest(r.shapes[0], r.bytes, r.out_shape, r.q[0].data, r.pool);
  }

 private:
  UpsampleStep step_;
};

StepPtr UpsampleStep::on_bytes() const {
  // A step of integers has one input only.
  if (u_.mode == Upsample::kBilinear || u_.like) return nullptr;
  return std::make_unique<ByteUpsampleStep>(*this);
}

int add_pixel_shuffle(PlanBuilder& plan, const StepArgs& args) {
  return add_step<PixelShuffleStep>(plan, args, args.integer("factor"));
}

Upsample upsample_mode(const std::string& name) {
  if (name == "nearest") return Upsample::kNearest;
  if (name == "nearest-exact") return Upsample::kNearestExact;
  require(name == "bilinear", "unknown upsampling %", name);
  return Upsample::kBilinear;
}

int add_upsample(PlanBuilder& plan, const StepArgs& args) {
  check_scaled(args);
  Upsampling u{.mode = upsample_mode(args.text("mode")),
               .scale_h = args.number("scale_h"),
               .scale_w = args.number("scale_w"),
               .align_corners = args.flag("align_corners"),
               .like = args.inputs.size() > 1};
  if (!args.integers("size").empty()) {
    const std::array<int64_t, 2> size = args.pair("size");
    u.height = size[0];
    u.width = size[1];
  }
  return add_step<UpsampleStep>(plan, args, u);
}

}  // namespace

void image_ops(OpRegistry& r) {
  r.add("pixel_shuffle", {.build = add_pixel_shuffle});
  r.add("upsample", {.build = add_upsample, .most = 2});
}

}  // namespace lutra
