// Steps that read images between their pixels: bicubic upsampling, and at the points of a grid.
#include <algorithm>
#include <array>
#include <cmath>

#include "engine/core/memory.h"
#include "engine/core/op_registry.h"
#include "engine/steps/scaled.h"

namespace lutra {
namespace {

using Inputs = std::vector<const float*>;

constexpr double kPerMicrosecond = 3e2;  // elements, a rough guess for one core
constexpr int64_t kTaps = 4;

// Which four entries of an axis a result is made of, and their weights.
struct Cubic {
  std::array<int32_t, kTaps> at;
  std::array<float, kTaps> weight;
};

// (a + 2) t^3 - (a + 3) t^2 + 1, for a distance of at most 1
float inner_weight(float t) {
  constexpr float a = -0.75f;
  return ((a + 2.0f) * t - (a + 3.0f)) * t * t + 1.0f;
}
// a t^3 - 5 a t^2 + 8 a t - 4 a, for a distance of 1 to 2
float outer_weight(float t) {
  constexpr float a = -0.75f;
  return ((a * t - 5.0f * a) * t + 8.0f * a) * t - 4.0f * a;
}

class BicubicStep : public FloatStep {
 public:
  BicubicStep(Sizes size, double scale_h, double scale_w, bool align_corners, bool like)
      : size_(std::move(size)), scale_{scale_h, scale_w}, aligned_(align_corners), like_(like) {}

  Shape infer(const Shapes& in) const override {
    const Shape& x = in[0];
    require(x.rank == 4, "an upsampling got the shape %", x);
    require(!like_ || in[1].rank == 4, "an upsampling got the shape %", in.back());
    Shape y = x;
    for (int i = 0; i < 2; ++i) {
      const size_t k = static_cast<size_t>(i);
      y[2 + i] = like_ ? in[1][2 + i]
                 : !size_.empty()
                     ? size_[k]
                     : static_cast<int64_t>(std::floor(static_cast<double>(x[2 + i]) * scale_[k]));
    }
    require(y[2] > 0 && y[3] > 0, "an upsampling leaves nothing of %", x);
    return y;
  }

  // The places of lines and columns, and four lines of results for every worker.
  size_t workspace(const Shapes& in, int threads) const override {
    const Shape y = infer(in);
    return places_bytes(y) + static_cast<size_t>(threads * kTaps * y[3]) * sizeof(float);
  }

 protected:
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t* workspace,
           ThreadPool& pool) const override {
    const Shape& x = shapes[0];
    if (y.size() == 0) return;
    Cubic* const rows = reinterpret_cast<Cubic*>(workspace);
    Cubic* const columns = rows + y[2];
    place(x[2], y[2], scale_[0], rows);
    place(x[3], y[3], scale_[1], columns);
    float* const lines = reinterpret_cast<float*>(workspace + places_bytes(y));
    const int64_t width = y[3];
    pool.run(static_cast<size_t>(x[0] * x[1]), static_cast<double>(y.size()) / kPerMicrosecond,
             [&](size_t plane, int worker) {
               plane_of(in[0] + static_cast<int64_t>(plane) * x[2] * x[3], x, y, rows, columns,
                        lines + worker * kTaps * width,
                        out + static_cast<int64_t>(plane) * y[2] * width);
             });
  }

 private:
  static size_t places_bytes(const Shape& y) {
    return align64(static_cast<size_t>(y[2] + y[3]) * sizeof(Cubic));
  }

  // One axis of n entries that becomes m; see the operator's specification for the equations.
  void place(int64_t n, int64_t m, double scale, Cubic* places) const {
    float step = 0.0f;
    if (aligned_) {
      if (m > 1) step = static_cast<float>(n - 1) / static_cast<float>(m - 1);
    } else if (scale > 0) {
      step = static_cast<float>(1.0 / scale);
    } else {
      step = static_cast<float>(n) / static_cast<float>(m);
    }
    for (int64_t j = 0; j < m; ++j) {
      const float k = static_cast<float>(j);
      const float s = aligned_ ? k * step : (k + 0.5f) * step - 0.5f;
      const float low = std::floor(s), t = s - low;
      Cubic& p = places[j];
      p.weight = {outer_weight(t + 1.0f), inner_weight(t), inner_weight(1.0f - t),
                  outer_weight(2.0f - t)};
      for (int64_t i = 0; i < kTaps; ++i) {
        p.at[static_cast<size_t>(i)] =
            static_cast<int32_t>(std::clamp<int64_t>(static_cast<int64_t>(low) - 1 + i, 0, n - 1));
      }
    }
  }

  // Lines of x at the columns of y are kept in the line of the memory of their number mod 4: the
  // four that a row needs follow each other.
  static void plane_of(const float* x, const Shape& from, const Shape& to, const Cubic* rows,
                       const Cubic* columns, float* lines, float* out) {
    const int64_t width = to[3];
    std::array<int64_t, kTaps> have{-1, -1, -1, -1};
    for (int64_t j = 0; j < to[2]; ++j, out += width) {
      std::array<const float*, kTaps> line;
      for (size_t k = 0; k < kTaps; ++k) {
        const int64_t row = rows[j].at[k];
        const size_t slot = static_cast<size_t>(row % kTaps);
        float* const made = lines + static_cast<int64_t>(slot) * width;
        line[k] = made;
        if (have[slot] == row) continue;
        have[slot] = row;
        const float* const source = x + row * from[3];
        for (int64_t i = 0; i < width; ++i) {
          const auto& [at, w] = columns[i];
          made[i] = source[at[0]] * w[0] + source[at[1]] * w[1] + source[at[2]] * w[2] +
                    source[at[3]] * w[3];
        }
      }
      const std::array<float, kTaps>& w = rows[j].weight;
      for (int64_t i = 0; i < width; ++i) {
        out[i] = line[0][i] * w[0] + line[1][i] * w[1] + line[2][i] * w[2] + line[3][i] * w[3];
      }
    }
  }

  Sizes size_;  // empty: not given
  std::array<double, 2> scale_;
  bool aligned_, like_;
};

enum class Outside { kZeros, kBorder, kReflection };

// x (N, C, H, W), grid (N, H', W', 2) of points (x, y) -> (N, C, H', W')
class GridSampleStep : public FloatStep {
 public:
  GridSampleStep(bool nearest, Outside outside, bool align_corners)
      : nearest_(nearest), outside_(outside), aligned_(align_corners) {}

  Shape infer(const Shapes& in) const override {
    const Shape &x = in[0], &grid = in[1];
    require(x.rank == 4 && grid.rank == 4 && grid[3] == 2 && grid[0] == x[0],
            "grid_sample of % got a grid %; it takes (N, C, H, W) and (N, H', W', 2)", x, grid);
    require(x[2] > 0 && x[3] > 0, "grid_sample got an empty image %", x);
    return {x[0], x[1], grid[1], grid[2]};
  }
  // The points of a line for every worker.
  size_t workspace(const Shapes& in, int threads) const override {
    return static_cast<size_t>(threads) * align64(static_cast<size_t>(in[1][2]) * sizeof(Point));
  }

 protected:
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t* workspace,
           ThreadPool& pool) const override {
    const Shape& x = shapes[0];
    const int64_t width = y[3], image = x[2] * x[3];
    const size_t each = align64(static_cast<size_t>(width) * sizeof(Point));
    pool.run(static_cast<size_t>(y[0] * y[2]), static_cast<double>(y.size()) / kPerMicrosecond,
             [&](size_t item, int worker) {
               const int64_t n = static_cast<int64_t>(item) % y[0];
               const int64_t line = static_cast<int64_t>(item) / y[0];
               Point* const points =
                   reinterpret_cast<Point*>(workspace + static_cast<size_t>(worker) * each);
               const float* const grid = in[1] + (line * y[0] + n) * width * 2;
               for (int64_t i = 0; i < width; ++i) {
                 points[i] = point(grid[2 * i], grid[2 * i + 1], x[2], x[3]);
               }
               for (int64_t c = 0; c < y[1]; ++c) {
                 const float* const from = in[0] + (c * x[0] + n) * image;
                 float* const to = out + ((c * y[0] + n) * y[2] + line) * width;
                 for (int64_t i = 0; i < width; ++i) {
                   const Point& p = points[i];
                   float sum = 0.0f;
                   for (size_t k = 0; k < 4; ++k) {
                     if (p.at[k] >= 0) sum += from[p.at[k]] * p.weight[k];
                   }
                   to[i] = sum;
                 }
               }
             });
  }

 private:
  // The four pixels around a point: upper left and right, lower left and right; -1 is none.
  struct Point {
    std::array<int64_t, 4> at;
    std::array<float, 4> weight;
  };

  // A coordinate in pixels. Further than two pixels outside of the image all points are alike.
  float coordinate(float g, int64_t count) const {
    const float size = static_cast<float>(count);
    float s = aligned_ ? (g + 1.0f) / 2.0f * (size - 1.0f) : ((g + 1.0f) * size - 1.0f) / 2.0f;
    if (outside_ == Outside::kReflection) {
      s = aligned_ ? reflected(s, 0.0f, size - 1.0f) : reflected(s, -0.5f, size - 0.5f);
    }
    const bool zeros = outside_ == Outside::kZeros;
    const float low = zeros ? -2.0f : 0.0f, high = zeros ? size + 1.0f : size - 1.0f;
    s = s > low ? s : low;  // also for NaN
    return s < high ? s : high;
  }
  static float reflected(float s, float low, float high) {
    const float span = high - low;
    if (!(span > 0.0f) || !std::isfinite(s)) return low;
    const float d = std::fabs(s - low), times = std::floor(d / span);
    const float rest = std::fmod(d, span);
    return std::fmod(times, 2.0f) == 0.0f ? low + rest : high - rest;
  }

  Point point(float gx, float gy, int64_t height, int64_t width) const {
    const float sx = coordinate(gx, width), sy = coordinate(gy, height);
    Point p;
    const auto at = [&](int64_t y, int64_t x) {
      return y >= 0 && y < height && x >= 0 && x < width ? y * width + x : int64_t{-1};
    };
    if (nearest_) {
      p.at = {
          at(static_cast<int64_t>(std::nearbyint(sy)), static_cast<int64_t>(std::nearbyint(sx))),
          -1, -1, -1};
      p.weight = {1.0f, 0.0f, 0.0f, 0.0f};
      return p;
    }
    const float left = std::floor(sx), top = std::floor(sy);
    const float right = left + 1.0f, bottom = top + 1.0f;
    const int64_t x = static_cast<int64_t>(left), y = static_cast<int64_t>(top);
    p.at = {at(y, x), at(y, x + 1), at(y + 1, x), at(y + 1, x + 1)};
    p.weight = {(right - sx) * (bottom - sy), (sx - left) * (bottom - sy),
                (right - sx) * (sy - top), (sx - left) * (sy - top)};
    return p;
  }

  bool nearest_;
  Outside outside_;
  bool aligned_;
};

int add_bicubic(PlanBuilder& plan, const StepArgs& args) {
  check_scaled(args);
  return add_step<BicubicStep>(plan, args, args.integers("size"), args.number("scale_h"),
                               args.number("scale_w"), args.flag("align_corners"),
                               args.inputs.size() > 1);
}

int add_grid_sample(PlanBuilder& plan, const StepArgs& args) {
  const std::string &mode = args.text("mode"), &padding = args.text("padding");
  require(mode == "bilinear" || mode == "nearest", "grid_sample: unknown mode %", mode);
  require(padding == "zeros" || padding == "border" || padding == "reflection",
          "grid_sample: unknown padding %", padding);
  const Outside outside = padding == "zeros"    ? Outside::kZeros
                          : padding == "border" ? Outside::kBorder
                                                : Outside::kReflection;
  return add_step<GridSampleStep>(plan, args, mode == "nearest", outside,
                                  args.flag("align_corners"));
}

}  // namespace

void resample_ops(OpRegistry& r) {
  r.add("upsample_bicubic", {.build = add_bicubic, .most = 2});
  r.add("grid_sample", {.build = add_grid_sample, .inputs = 2});
}

}  // namespace lutra
