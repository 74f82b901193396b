#include "steps_image.h"

#include <algorithm>

namespace lutra {
namespace {

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
    require(x.rank == 4 && x[1] % (factor_ * factor_) == 0,
            "a pixel shuffle by " + std::to_string(factor_) + " got the shape " + x.text());
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

}  // namespace

StepPtr pixel_shuffle_step(int64_t factor) { return std::make_unique<PixelShuffleStep>(factor); }

}  // namespace lutra
