#include "engine/core/elementwise.h"

#include <algorithm>
#include <cmath>

namespace lutra {
namespace {

class Limits : public Elementwise {
 public:
  Limits(float low, float high) : low_(low), high_(high) {}
  void apply(const float* x, size_t n, const Channels&, float* y) const override {
    const float low = low_, high = high_;
    for (size_t i = 0; i < n; ++i) {
      const float v = x[i] > low ? x[i] : low;
      y[i] = v < high ? v : high;
    }
  }
  bool extend(int64_t, Line&) const override { return true; }

 private:
  float low_, high_;
};

class Affine : public Elementwise {
 public:
  Affine(std::vector<float> scale, std::vector<float> bias)
      : scale_(std::move(scale)), bias_(std::move(bias)) {}
  int64_t channels() const override { return size() > 1 ? size() : 0; }
  void apply(const float* x, size_t n, const Channels& channels, float* y) const override {
    const int64_t count = static_cast<int64_t>(n);
    if (size() == 1) return line(x, count, 0, y);
    if (channels.step == 1) {  // the channels of one place after the other
      int64_t c = channels.first % size();
      for (int64_t i = 0; i < count; c = 0) {
        const int64_t some = std::min(count - i, size() - c);
        const float *const s = scale_.data() + c, *const b = bias_.data() + c;
        for (int64_t k = 0; k < some; ++k) y[i + k] = x[i + k] * s[k] + b[k];
        i += some;
      }
      return;
    }
    for (int64_t i = 0; i < count;) {
      const int64_t at = channels.first + i;
      const int64_t some = std::min(count - i, channels.step - at % channels.step);
      line(x + i, some, at / channels.step % size(), y + i);
      i += some;
    }
  }
  bool extend(int64_t channel, Line& line) const override {
    const size_t c = static_cast<size_t>(size() == 1 ? 0 : channel % size());
    line.scale *= static_cast<double>(scale_[c]);
    line.shift = line.shift * static_cast<double>(scale_[c]) + static_cast<double>(bias_[c]);
    const double offset = std::abs(line.shift / line.scale);
    line.offset = offset > line.offset || std::isnan(offset) ? offset : line.offset;
    ++line.functions;
    return true;
  }

 private:
  int64_t size() const { return static_cast<int64_t>(scale_.size()); }
  void line(const float* x, int64_t n, int64_t channel, float* y) const {
    const float s = scale_[static_cast<size_t>(channel)], b = bias_[static_cast<size_t>(channel)];
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * s + b;
  }

  std::vector<float> scale_, bias_;
};

class InOrder : public Elementwise {
 public:
  InOrder(ElementwisePtr first, ElementwisePtr next)
      : first_(std::move(first)), next_(std::move(next)) {}
  int64_t channels() const override { return std::max(first_->channels(), next_->channels()); }
  void apply(const float* x, size_t n, const Channels& channels, float* y) const override {
    first_->apply(x, n, channels, y);
    next_->apply(y, n, channels, y);
  }
  bool extend(int64_t channel, Line& line) const override {
    return first_->extend(channel, line) && next_->extend(channel, line);
  }

 private:
  ElementwisePtr first_, next_;
};

}  // namespace

ElementwisePtr in_order(ElementwisePtr first, ElementwisePtr next) {
  if (!first) return next;
  return std::make_shared<InOrder>(std::move(first), std::move(next));
}

ElementwisePtr limits(float low, float high) { return std::make_shared<Limits>(low, high); }

ElementwisePtr affine(std::vector<float> scale, std::vector<float> bias) {
  require(!scale.empty() && scale.size() == bias.size(), "scale and bias differ in length");
  return std::make_shared<Affine>(std::move(scale), std::move(bias));
}

}  // namespace lutra
