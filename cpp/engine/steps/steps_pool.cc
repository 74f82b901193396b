// Pooling of images.
#include <algorithm>
#include <cmath>

#include "engine/core/op_registry.h"
#include "engine/layers/conv_geometry.h"

namespace lutra {
namespace {

enum class Pool { kMax, kAverage };

using Inputs = std::vector<const float*>;

constexpr double kPerMicrosecond = 1e3;  // elements, a rough guess for one core

// Calls f(channel and image plane of x, of y, worker) for every plane.
template <class T, class F>
void over_planes(const Shape& x, const Shape& y, const T* in, T* out, ThreadPool& pool,
                 const F& f) {
  pool.run(static_cast<size_t>(x[0] * x[1]), static_cast<double>(x.size()) / kPerMicrosecond,
           [&](size_t i, int worker) {
             f(in + static_cast<int64_t>(i) * x[2] * x[3],
               out + static_cast<int64_t>(i) * y[2] * y[3], worker);
           });
}

// What is put around images before they are pooled: so many lines and columns of one value.
struct Border {
  int64_t top = 0, bottom = 0, left = 0, right = 0;
  float value = 0.0f;
};

class PoolStep : public FloatStep {
 public:
  PoolStep(const Kernels& kernels, Pool kind, const ConvGeometry& g, const Border& border,
           bool ceil_mode, bool count_include_pad)
      : kernels_(kernels),
        kind_(kind),
        g_(g),
        border_(border),
        ceil_mode_(ceil_mode),
        count_include_pad_(count_include_pad) {}

  Shape infer(const Shapes& in) const override {
    const Shape& x = in[0];
    require(x.rank == 4, "a 2-D pooling got the shape %", x);
    const Shape y{x[0], x[1], out(high(x), g_.kernel_h, g_.stride_h, g_.pad_h, g_.dilation_h),
                  out(wide(x), g_.kernel_w, g_.stride_w, g_.pad_w, g_.dilation_w)};
    require(y[2] > 0 && y[3] > 0, "the pooling window is larger than the padded image %", x);
    return y;
  }

  size_t workspace(const Shapes& in, int threads) const override {
    return static_cast<size_t>(wide(in[0])) * sizeof(float) * static_cast<size_t>(threads);
  }
  StepPtr on_bytes() const override;

  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out_data,
           uint8_t* workspace, ThreadPool& pool) const override {
    const Shape& x = shapes[0];
    if (kind_ == Pool::kMax) {
      return max(x, in[0], y, out_data, -INFINITY, border_.value, workspace, pool);
    }
    over_planes(x, y, in[0], out_data, pool, [&](const float* from, float* to, int) {
      for (int64_t oy = 0; oy < y[2]; ++oy) {
        for (int64_t ox = 0; ox < y[3]; ++ox) *to++ = average(from, x, oy, ox);
      }
    });
  }

  const Border& border() const { return border_; }
  int64_t wide(const Shape& x) const { return x[3] + border_.left + border_.right; }

  // The workspace holds a line of x with its border for every worker.
  template <class T>
  void max(const Shape& x, const T* in, const Shape& y, T* out_data, T lowest, T border,
           uint8_t* workspace, ThreadPool& pool) const {
    if (halves(x, y)) {
      return over_planes(x, y, in, out_data, pool, [&](const T* from, T* to, int) {
        for (int64_t oy = 0; oy < y[2]; ++oy, from += 2 * x[3], to += y[3]) {
          max_2x2(from, from + x[3], y[3], lowest, to);
        }
      });
    }
    over_planes(x, y, in, out_data, pool, [&](const T* from, T* to, int worker) {
      T* const line = reinterpret_cast<T*>(workspace) + worker * wide(x);
      for (int64_t oy = 0; oy < y[2]; ++oy, to += y[3])
        max_line(from, x, oy, y[3], lowest, border, line, to);
    });
  }

 private:
  int64_t high(const Shape& x) const { return x[2] + border_.top + border_.bottom; }

  // Windows of 2x2 side by side that the image fills: most poolings.
  bool halves(const Shape& x, const Shape& y) const {
    return g_.kernel_h == 2 && g_.kernel_w == 2 && g_.stride_h == 2 && g_.stride_w == 2 &&
           g_.pad_h == 0 && g_.pad_w == 0 && g_.dilation_h == 1 && g_.dilation_w == 1 &&
           high(x) == x[2] && wide(x) == x[3] && 2 * y[2] <= x[2] && 2 * y[3] <= x[3];
  }

  // The order of comparisons is that of max_line(), which tells between zeros of two signs.
  template <class T>
  static void max_2x2(const T* __restrict upper, const T* __restrict lower, int64_t width, T lowest,
                      T* __restrict to) {
    for (int64_t i = 0; i < width; ++i) {
      const T a = upper[2 * i], b = upper[2 * i + 1], c = lower[2 * i], d = lower[2 * i + 1];
      const T a0 = a > lowest ? a : lowest, b0 = b > lowest ? b : lowest;
      const T left = c > a0 ? c : a0, right = d > b0 ? d : b0;
      to[i] = right > left ? right : left;
    }
  }

  // One line of outputs: the greatest of each column first, then of each window of columns. NaN is
  // passed over.
  template <class T>
  void max_line(const T* from, const Shape& x, int64_t oy, int64_t width, T lowest, T border,
                T* line, T* to) const {
    const int64_t columns = wide(x), left = border_.left;
    std::fill(line, line + columns, lowest);
    for (int64_t ky = 0; ky < g_.kernel_h; ++ky) {
      const int64_t yy = oy * g_.stride_h - g_.pad_h + ky * g_.dilation_h;
      if (yy < 0 || yy >= high(x)) continue;
      if (yy < border_.top || yy >= border_.top + x[2]) {
        raise(line, columns, border);
        continue;
      }
      const T* const row = from + (yy - border_.top) * x[3];
      T* const inside = line + left;
      raise(line, left, border);
      for (int64_t i = 0, n = x[3]; i < n; ++i) inside[i] = row[i] > inside[i] ? row[i] : inside[i];
      raise(inside + x[3], border_.right, border);
    }
    std::fill(to, to + width, lowest);
    const int64_t stride = g_.stride_w;
    for (int64_t kx = 0; kx < g_.kernel_w; ++kx) {
      const int64_t shift = kx * g_.dilation_w - g_.pad_w;  // column = ox * stride + shift
      const int64_t first = shift < 0 ? (-shift + stride - 1) / stride : 0;
      const int64_t room = columns - 1 - shift;
      const int64_t last = room < 0 ? 0 : std::min(width, room / stride + 1);
      const T* const column = line + shift;
      if (stride == 2) {  // a constant stride becomes vector code
        for (int64_t ox = first; ox < last; ++ox) {
          to[ox] = column[2 * ox] > to[ox] ? column[2 * ox] : to[ox];
        }
        continue;
      }
      for (int64_t ox = first; ox < last; ++ox) {
        to[ox] = column[ox * stride] > to[ox] ? column[ox * stride] : to[ox];
      }
    }
  }

  template <class T>
  static void raise(T* line, int64_t count, T value) {
    for (int64_t i = 0; i < count; ++i) line[i] = value > line[i] ? value : line[i];
  }

  int64_t out(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) const {
    const int64_t span = size + 2 * pad - dilation * (kernel - 1) - 1;
    const int64_t room = span + (ceil_mode_ ? stride - 1 : 0);
    if (room < 0) return 0;
    int64_t n = room / stride + 1;
    // A window must start inside the image or its left padding.
    if (ceil_mode_ && (n - 1) * stride >= size + pad) --n;
    return n;
  }

  float average(const float* from, const Shape& x, int64_t oy, int64_t ox) const {
    const int64_t y0 = oy * g_.stride_h - g_.pad_h, x0 = ox * g_.stride_w - g_.pad_w;
    const int64_t height = high(x), width = wide(x);
    // Only average pooling comes here: its windows have no gaps.
    const int64_t y_end = std::min(y0 + g_.kernel_h, height);
    const int64_t x_end = std::min(x0 + g_.kernel_w, width);
    const int64_t y_start = std::max<int64_t>(y0, 0), x_start = std::max<int64_t>(x0, 0);
    float sum = 0.0f;
    for (int64_t yy = y_start; yy < y_end; ++yy) {
      for (int64_t xx = x_start; xx < x_end; ++xx) {
        sum += at(from, x, yy - border_.top, xx - border_.left);
      }
    }
    const int64_t inside =
        std::max<int64_t>(y_end - y_start, 0) * std::max<int64_t>(x_end - x_start, 0);
    // With padding counted, the window still ends with the padded image.
    const int64_t padded = (std::min(y0 + g_.kernel_h, height + g_.pad_h) - y0) *
                           (std::min(x0 + g_.kernel_w, width + g_.pad_w) - x0);
    return sum / static_cast<float>(count_include_pad_ ? padded : inside);
  }

  float at(const float* from, const Shape& x, int64_t row, int64_t column) const {
    const bool inside = row >= 0 && row < x[2] && column >= 0 && column < x[3];
    return inside ? from[row * x[3] + column] : border_.value;
  }

  const Kernels& kernels_;
  Pool kind_;
  ConvGeometry g_;
  Border border_;
  bool ceil_mode_, count_include_pad_;
};

// A max pooling of integers on a grid, which keeps their order.
class BytePoolStep : public Step {
 public:
  BytePoolStep(const Kernels& kernels, const PoolStep& pool) : kernels_(kernels), pool_(pool) {}
  Shape infer(const Shapes& in) const override { return pool_.infer(in); }
  size_t workspace(const Shapes& in, int threads) const override {
    return static_cast<size_t>(pool_.wide(in[0])) * static_cast<size_t>(threads);
  }
  std::string method(const Shapes&) const override { return "uint8"; }
  void run(const StepRun& r) const override {
    uint8_t border;
    kernels_.quantize(&pool_.border().value, 1, r.q[0].grid, &border);
    pool_.max<uint8_t>(r.shapes[0], r.bytes, r.out_shape, r.q[0].data, 0, border, r.workspace,
                       r.pool);
  }

 private:
  const Kernels& kernels_;
  PoolStep pool_;
};

StepPtr PoolStep::on_bytes() const {
  return kind_ == Pool::kMax ? std::make_unique<BytePoolStep>(kernels_, *this) : nullptr;
}

class AdaptivePoolStep : public FloatStep {
 public:
  AdaptivePoolStep(Pool kind, int64_t h, int64_t w) : kind_(kind), h_(h), w_(w) {}
  Shape infer(const Shapes& in) const override {
    require(in[0].rank == 4, "a 2-D pooling got the shape %", in[0]);
    return {in[0][0], in[0][1], h_, w_};
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool& pool) const override {
    const Shape& x = shapes[0];
    over_planes(x, y, in[0], out, pool, [&](const float* from, float* to, int) {
      for (int64_t oy = 0; oy < h_; ++oy) {
        const int64_t y0 = oy * x[2] / h_, y1 = ((oy + 1) * x[2] + h_ - 1) / h_;
        for (int64_t ox = 0; ox < w_; ++ox) {
          const int64_t x0 = ox * x[3] / w_, x1 = ((ox + 1) * x[3] + w_ - 1) / w_;
          float top = -INFINITY;
          double sum = 0.0;
          for (int64_t yy = y0; yy < y1; ++yy) {
            for (int64_t xx = x0; xx < x1; ++xx) {
              top = std::max(top, from[yy * x[3] + xx]);
              sum += from[yy * x[3] + xx];
            }
          }
          const float count = static_cast<float>((y1 - y0) * (x1 - x0));
          *to++ = kind_ == Pool::kMax ? top : static_cast<float>(sum) / count;
        }
      }
    });
  }

 private:
  Pool kind_;
  int64_t h_, w_;
};

// What the plan puts there for a padding in front of the pooling: lines above and below, columns
// before and behind, and their value.
Border border_of(const StepArgs& args) {
  if (args.attrs.count("border") == 0) return {};
  const Sizes& sizes = args.integers("border");
  require(sizes.size() == 4, "% needs four integers as the attribute 'border'", args.op);
  for (const int64_t size : sizes) require(size >= 0, "%: a border is negative", args.op);
  return {sizes[0], sizes[1], sizes[2], sizes[3], args.float32("border_value")};
}

int add_max_pool(PlanBuilder& plan, const StepArgs& args) {
  return add_step<PoolStep>(plan, args, plan.kernels(), Pool::kMax,
                            conv_geometry(args, 1, args.pair("kernel")), border_of(args),
                            args.flag("ceil_mode"), false);
}

int add_average_pool(PlanBuilder& plan, const StepArgs& args) {
  const ConvGeometry window =
      conv_geometry(1, args.pair("kernel"), args.pair("stride"), args.integers("padding"), {1, 1});
  return add_step<PoolStep>(plan, args, plan.kernels(), Pool::kAverage, window, border_of(args),
                            args.flag("ceil_mode"), args.flag("count_include_pad"));
}

template <Pool kKind>
int add_adaptive_pool(PlanBuilder& plan, const StepArgs& args) {
  const std::array<int64_t, 2> size = args.pair("output_size");
  return add_step<AdaptivePoolStep>(plan, args, kKind, size[0], size[1]);
}

}  // namespace

void pool_ops(OpRegistry& r) {
  r.add("max_pool2d", {.build = add_max_pool});
  r.add("avg_pool2d", {.build = add_average_pool});
  r.add("adaptive_max_pool2d", {.build = add_adaptive_pool<Pool::kMax>});
  r.add("adaptive_avg_pool2d", {.build = add_adaptive_pool<Pool::kAverage>});
}

}  // namespace lutra
