#include "steps_basic.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace lutra {

void require(bool ok, const std::string& what) {
  if (!ok) throw std::invalid_argument(what);
}

size_t Step::workspace(const std::vector<Shape>&, int) const { return 0; }

namespace {

using Shapes = std::vector<Shape>;
using Inputs = std::vector<const float*>;

constexpr double kPerMicrosecond = 1e3;  // elements, a rough guess for one core
constexpr int64_t kBlock = 16384;        // elements per work item of an element-wise step

template <class F>
void in_blocks(int64_t size, ThreadPool& pool, const F& f) {
  const double time = static_cast<double>(size) / kPerMicrosecond;
  pool.run(static_cast<size_t>((size + kBlock - 1) / kBlock), time, [&](size_t i, int) {
    const int64_t first = static_cast<int64_t>(i) * kBlock;
    f(first, std::min(size, first + kBlock));
  });
}

class ClampStep : public Step {
 public:
  ClampStep(float low, float high) : low_(low), high_(high) {}
  Shape infer(const Shapes& in) const override { return in[0]; }
  void run(const Shapes& shapes, const Inputs& in, const Shape&, float* out, uint8_t*,
           ThreadPool& pool) const override {
    in_blocks(shapes[0].size(), pool, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const float v = in[0][i] > low_ ? in[0][i] : low_;
        out[i] = v < high_ ? v : high_;
      }
    });
  }

 private:
  float low_, high_;
};

class AddStep : public Step {
 public:
  Shape infer(const Shapes& in) const override {
    require(in[0] == in[1], "add: the shapes " + in[0].text() + " and " + in[1].text() + " differ");
    return in[0];
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape&, float* out, uint8_t*,
           ThreadPool& pool) const override {
    in_blocks(shapes[0].size(), pool, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) out[i] = in[0][i] + in[1][i];
    });
  }
};

class AffineStep : public Step {
 public:
  AffineStep(std::vector<float> scale, std::vector<float> bias)
      : scale_(std::move(scale)), bias_(std::move(bias)) {}
  Shape infer(const Shapes& in) const override {
    require(in[0].rank >= 2 && in[0][1] == static_cast<int64_t>(scale_.size()),
            "affine over " + std::to_string(scale_.size()) + " channels got " + in[0].text());
    return in[0];
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape&, float* out, uint8_t*,
           ThreadPool& pool) const override {
    const int64_t plane = shapes[0].batch() * shapes[0].inner();
    pool.run(scale_.size(), static_cast<double>(shapes[0].size()) / kPerMicrosecond,
             [&](size_t c, int) {
               const float s = scale_[c], b = bias_[c];
               const float* x = in[0] + static_cast<int64_t>(c) * plane;
               float* y = out + static_cast<int64_t>(c) * plane;
               for (int64_t i = 0; i < plane; ++i) y[i] = x[i] * s + b;
             });
  }

 private:
  std::vector<float> scale_, bias_;
};

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

class SoftmaxStep : public Step {
 public:
  explicit SoftmaxStep(int axis) : axis_(axis) {}
  Shape infer(const Shapes& in) const override {
    require(axis_ > 0 && axis_ < in[0].rank, "softmax: no axis " + std::to_string(axis_));
    return in[0];
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape&, float* out, uint8_t*,
           ThreadPool&) const override {
    const Shape& s = shapes[0];
    const Dims strides = storage_strides(s);
    const int64_t n = s[axis_], step = strides[axis_];
    std::vector<bool> skip(kMaxRank, false);
    skip[axis_] = true;
    visit(s, skip, [&](const Dims& index) {
      const int64_t at = offset(index, strides, s.rank);
      const float* x = in[0] + at;
      float* y = out + at;
      float top = x[0], sum = 0.0f;
      for (int64_t i = 1; i < n; ++i) top = std::max(top, x[i * step]);
      for (int64_t i = 0; i < n; ++i) sum += y[i * step] = std::exp(x[i * step] - top);
      for (int64_t i = 0; i < n; ++i) y[i * step] = y[i * step] / sum;
    });
  }

 private:
  int axis_;
};

class MeanStep : public Step {
 public:
  MeanStep(std::vector<int> axes, bool keepdims) : reduced_(kMaxRank, false), keepdims_(keepdims) {
    for (int a : axes) {
      require(a >= 1 && a < kMaxRank, "mean: axis " + std::to_string(a) + " is not 1..5");
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
           ThreadPool&) const override {
    const Shape& s = shapes[0];
    const Dims from = storage_strides(s), to = storage_strides(out_shape);
    Shape window = s;
    std::vector<bool> kept(kMaxRank, false);
    for (int i = 0; i < s.rank; ++i) kept[i] = !reduced_[i];
    float count = 1.0f;
    for (int i = 0; i < s.rank; ++i) {
      if (reduced_[i]) count *= static_cast<float>(s[i]);
    }
    visit(s, reduced_, [&](const Dims& index) {
      const float* x = in[0] + offset(index, from, s.rank);
      double sum = 0.0;
      visit(window, kept, [&](const Dims& i) { sum += x[offset(i, from, s.rank)]; });
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
  std::vector<bool> reduced_;
  bool keepdims_;
};

class ReshapeStep : public Step {
 public:
  explicit ReshapeStep(std::vector<int64_t> shape) : shape_(std::move(shape)) {
    require(shape_.size() < kMaxRank, "reshape: more than 6 axes");
  }
  Shape infer(const Shapes& in) const override {
    Shape y{in[0].batch()};
    for (int64_t d : shape_) y[y.rank++] = d;
    require(y.size() == in[0].size(), "reshape: " + in[0].text() + " does not fit " + y.text());
    return y;
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool&) const override {
    const Shape& x = shapes[0];
    const int64_t n = x.batch(), each = x.size() / std::max<int64_t>(n, 1);
    const int64_t from = x.inner(), to = y.inner();
    if (from == to) {
      std::copy(in[0], in[0] + x.size(), out);
      return;
    }
    for (int64_t i = 0; i < each; ++i) {
      const float* source = in[0] + i / from * n * from + i % from;
      float* target = out + i / to * n * to + i % to;
      for (int64_t j = 0; j < n; ++j) target[j * to] = source[j * from];
    }
  }

 private:
  std::vector<int64_t> shape_;
};

class PadStep : public Step {
 public:
  PadStep(std::vector<int64_t> before, std::vector<int64_t> after, float value)
      : before_(std::move(before)), after_(std::move(after)), value_(value) {}
  Shape infer(const Shapes& in) const override {
    require(before_.size() == static_cast<size_t>(in[0].rank), "pad: one pair per axis is needed");
    Shape y = in[0];
    for (int i = 0; i < y.rank; ++i) y[i] += before_[i] + after_[i];
    return y;
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool&) const override {
    const Dims to = storage_strides(y);
    std::fill(out, out + y.size(), value_);
    int64_t at = 0;
    for (int i = 0; i < y.rank; ++i) at += before_[i] * to[i];
    copy_strided(shapes[0], in[0], storage_strides(shapes[0]), out + at, to);
  }

 private:
  std::vector<int64_t> before_, after_;
  float value_;
};

class SliceStep : public Step {
 public:
  SliceStep(int axis, int64_t start, int64_t stop, int64_t step)
      : axis_(axis), start_(start), stop_(stop), step_(step) {
    require(axis > 0 && axis < kMaxRank && start >= 0 && stop > start && step > 0,
            "slice: it takes nothing");
  }
  Shape infer(const Shapes& in) const override {
    Shape y = in[0];
    require(axis_ < y.rank && stop_ <= y[axis_], "slice: it ends outside " + in[0].text());
    y[axis_] = (stop_ - start_ + step_ - 1) / step_;
    return y;
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool&) const override {
    Dims from = storage_strides(shapes[0]);
    const float* source = in[0] + start_ * from[axis_];
    from[axis_] *= step_;
    copy_strided(y, source, from, out, storage_strides(y));
  }

 private:
  int axis_;
  int64_t start_, stop_, step_;
};

class ConcatStep : public Step {
 public:
  explicit ConcatStep(int axis) : axis_(axis) {}
  Shape infer(const Shapes& in) const override {
    Shape y = in[0];
    require(axis_ > 0 && axis_ < y.rank, "concat: no axis " + std::to_string(axis_));
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

// Calls f(channel and image plane of x, of y) for every plane.
template <class F>
void over_planes(const Shape& x, const Shape& y, const float* in, float* out, ThreadPool& pool,
                 const F& f) {
  pool.run(static_cast<size_t>(x[0] * x[1]), static_cast<double>(x.size()) / kPerMicrosecond,
           [&](size_t i, int) {
             f(in + static_cast<int64_t>(i) * x[2] * x[3],
               out + static_cast<int64_t>(i) * y[2] * y[3]);
           });
}

class PoolStep : public Step {
 public:
  PoolStep(Pool kind, const ConvGeometry& g, bool ceil_mode, bool count_include_pad)
      : kind_(kind), g_(g), ceil_mode_(ceil_mode), count_include_pad_(count_include_pad) {}

  Shape infer(const Shapes& in) const override {
    const Shape& x = in[0];
    require(x.rank == 4, "a 2-D pooling got the shape " + x.text());
    const Shape y{x[0], x[1], out(x[2], g_.kernel_h, g_.stride_h, g_.pad_h, g_.dilation_h),
                  out(x[3], g_.kernel_w, g_.stride_w, g_.pad_w, g_.dilation_w)};
    require(y[2] > 0 && y[3] > 0, "the pooling window is larger than the padded image " + x.text());
    return y;
  }

  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out_data, uint8_t*,
           ThreadPool& pool) const override {
    const Shape& x = shapes[0];
    over_planes(x, y, in[0], out_data, pool, [&](const float* from, float* to) {
      for (int64_t oy = 0; oy < y[2]; ++oy) {
        for (int64_t ox = 0; ox < y[3]; ++ox) *to++ = window(from, x, oy, ox);
      }
    });
  }

 private:
  int64_t out(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) const {
    const int64_t span = size + 2 * pad - dilation * (kernel - 1) - 1;
    if (span < 0) return 0;
    int64_t n = (span + (ceil_mode_ ? stride - 1 : 0)) / stride + 1;
    // A window must start inside the image or its left padding.
    if (ceil_mode_ && (n - 1) * stride >= size + pad) --n;
    return n;
  }

  float window(const float* from, const Shape& x, int64_t oy, int64_t ox) const {
    const int64_t y0 = oy * g_.stride_h - g_.pad_h, x0 = ox * g_.stride_w - g_.pad_w;
    float top = -INFINITY, sum = 0.0f;
    int64_t inside = 0;
    for (int64_t ky = 0; ky < g_.kernel_h; ++ky) {
      const int64_t yy = y0 + ky * g_.dilation_h;
      if (yy < 0 || yy >= x[2]) continue;
      for (int64_t kx = 0; kx < g_.kernel_w; ++kx) {
        const int64_t xx = x0 + kx * g_.dilation_w;
        if (xx < 0 || xx >= x[3]) continue;
        const float v = from[yy * x[3] + xx];
        top = std::max(top, v);
        sum += v;
        ++inside;
      }
    }
    if (kind_ == Pool::kMax) return top;
    // With padding counted, the window still ends with the padded image.
    const int64_t padded = (std::min(y0 + g_.kernel_h, x[2] + g_.pad_h) - y0) *
                           (std::min(x0 + g_.kernel_w, x[3] + g_.pad_w) - x0);
    return sum / static_cast<float>(count_include_pad_ ? padded : inside);
  }

  Pool kind_;
  ConvGeometry g_;
  bool ceil_mode_, count_include_pad_;
};

class AdaptivePoolStep : public Step {
 public:
  AdaptivePoolStep(Pool kind, int64_t h, int64_t w) : kind_(kind), h_(h), w_(w) {}
  Shape infer(const Shapes& in) const override {
    require(in[0].rank == 4, "a 2-D pooling got the shape " + in[0].text());
    return {in[0][0], in[0][1], h_, w_};
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool& pool) const override {
    const Shape& x = shapes[0];
    over_planes(x, y, in[0], out, pool, [&](const float* from, float* to) {
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

}  // namespace

StepPtr clamp_step(float low, float high) { return std::make_unique<ClampStep>(low, high); }
StepPtr add_step() { return std::make_unique<AddStep>(); }
StepPtr affine_step(std::vector<float> scale, std::vector<float> bias) {
  return std::make_unique<AffineStep>(std::move(scale), std::move(bias));
}
StepPtr softmax_step(int axis) { return std::make_unique<SoftmaxStep>(axis); }
StepPtr mean_step(std::vector<int> axes, bool keepdims) {
  return std::make_unique<MeanStep>(std::move(axes), keepdims);
}
StepPtr reshape_step(std::vector<int64_t> shape) {
  return std::make_unique<ReshapeStep>(std::move(shape));
}
StepPtr pad_step(std::vector<int64_t> before, std::vector<int64_t> after, float value) {
  return std::make_unique<PadStep>(std::move(before), std::move(after), value);
}
StepPtr slice_step(int axis, int64_t start, int64_t stop, int64_t step) {
  return std::make_unique<SliceStep>(axis, start, stop, step);
}
StepPtr concat_step(int axis) { return std::make_unique<ConcatStep>(axis); }
StepPtr pool_step(Pool kind, const ConvGeometry& window, bool ceil_mode, bool count_include_pad) {
  return std::make_unique<PoolStep>(kind, window, ceil_mode, count_include_pad);
}
StepPtr adaptive_pool_step(Pool kind, int64_t out_h, int64_t out_w) {
  return std::make_unique<AdaptivePoolStep>(kind, out_h, out_w);
}

}  // namespace lutra
