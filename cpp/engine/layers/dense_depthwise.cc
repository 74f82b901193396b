#include "engine/layers/dense_depthwise.h"

#include <algorithm>

#include "engine/layers/layer_step.h"

namespace lutra {
namespace {

constexpr double kWorkPerMicrosecond = 2e4;  // multiply-adds of one core, a rough guess

class DepthwiseStep : public LayerStep {
 public:
  DepthwiseStep(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs,
                const float* weight, const float* bias, const StepArgs& args)
      : LayerStep(geometry, outputs, false, args),
        kernels_(kernels),
        weight_(weight, weight + outputs * geometry.taps()),
        bias_(bias, bias + outputs),
        planes_(kernels, geometry, outputs, false) {}
  size_t workspace(const Shapes& inputs, int threads) const override {
    const auto planes = planes_.find(inputs[0][2], inputs[0][3]);
    return static_cast<size_t>(threads) * worker(*planes, threads);
  }
  void run(const StepRun& r) const override;
  std::string method(const Shapes&) const override { return "float32, depthwise"; }
  size_t parameter_bytes() const override { return weight_.size() * sizeof(float); }

 private:
  // Bytes of a worker: copies of planes, and what functions need.
  size_t worker(const DepthwisePlanes& planes, int threads) const {
    const int64_t floats = block(planes, threads) * planes.plane;
    return align64(static_cast<size_t>(floats) * sizeof(float)) +
           TileOutput::scratch_bytes(0, kernels_.row_tile, true);
  }
  int64_t block(const DepthwisePlanes& planes, int threads) const {
    return depthwise_block(geometry_.channels, planes.plane * static_cast<int64_t>(sizeof(float)),
                           threads);
  }

  const Kernels& kernels_;
  std::vector<float> weight_, bias_;
  DepthwiseCache planes_;
};

void DepthwiseStep::run(const StepRun& r) const {
  const View<const float> x = stored_image(r.shapes[0], r.inputs[0]);
  const auto planes = planes_.find(x.h, x.w);
  const LayerOutput out = output(r);
  const TileOutput target(out, kernels_, nullptr, nullptr, bias_.data());
  const int64_t block = this->block(*planes, r.pool.threads()), blocks = (x.c + block - 1) / block;
  const size_t stride = worker(*planes, r.pool.threads());
  const int64_t multiplier = planes_.shape.multiplier, taps = geometry_.taps();
  const double work = static_cast<double>(x.n * planes->outputs * outputs_ * taps);
  const float* const end = x.data + (x.n - 1) * x.sn + (x.c - 1) * x.sc + x.h * x.w;
  r.pool.run(
      static_cast<size_t>(x.n * blocks), work / kWorkPerMicrosecond, [&](size_t i, int worker) {
        float* const copies =
            reinterpret_cast<float*>(r.workspace + static_cast<size_t>(worker) * stride);
        uint8_t* const scratch = reinterpret_cast<uint8_t*>(copies + block * planes->plane);
        const int64_t n = static_cast<int64_t>(i) / blocks;
        const int64_t c = static_cast<int64_t>(i) % blocks * block;
        const int64_t count = std::min(block, x.c - c);
        const auto from =
            planes->source(x.data + n * x.sn + c * x.sc, x.sc, count, x.data, end, copies);
        const float* const weight = weight_.data() + c * multiplier * taps;
        for (const DepthwisePlanes::Tile& t : planes->tiles) {
          const DepthwiseTile<float> tile{.planes = from.first + t.at,
                                          .plane = from.plane,
                                          .offset = planes->offset.data(),
                                          .masks = planes->masks(t.masks),
                                          .zero = 0.0f};
          target.make(n * planes->outputs + t.first, t.count, scratch, c * multiplier, 0,
                      count * multiplier, [&](int64_t from, int64_t to, const Epilogue& e) {
                        kernels_.depthwise(planes_.shape, weight, tile, static_cast<int32_t>(from),
                                           static_cast<int32_t>(to), e);
                      });
        }
      });
}

}  // namespace

StepPtr make_depthwise(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs,
                       const float* weight, const float* bias, const StepArgs& args) {
  require(outputs % geometry.channels == 0, "groups must divide the outputs of a convolution");
  return std::make_unique<DepthwiseStep>(kernels, geometry, outputs, weight, bias, args);
}

}  // namespace lutra
