#include "engine/layers/int8_depthwise.h"

#include <algorithm>

#include "engine/core/limits.h"
#include "engine/layers/grid_layer.h"

namespace lutra {
namespace {

constexpr double kWorkPerMicrosecond = 5e4;  // multiply-adds of one core, a rough guess

class Int8DepthwiseLayer : public GridLayer {
 public:
  Int8DepthwiseLayer(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs,
                     const Quantization& quantization, const int8_t* weight, const float* scale,
                     const float* bias);
  size_t parameter_bytes() const override {
    return kernels_.depthwise8_bytes(planes_.shape, static_cast<int32_t>(outputs_));
  }
  std::string method(int64_t) const override { return "int8, depthwise"; }

 private:
  ConvGeometry source_geometry() const override { return {.channels = geometry_.channels}; }
  Memory memory(const PatchSource& source, int threads, bool direct) const override;
  void run_loaded(const Call& call) const override;
  int64_t largest_sum() const override { return 127 * depth() * quantization_.qmax(); }

  DepthwiseCache planes_;
  AlignedBytes weight_;
};

Int8DepthwiseLayer::Int8DepthwiseLayer(const Kernels& kernels, const ConvGeometry& geometry,
                                       int64_t outputs, const Quantization& quantization,
                                       const int8_t* weight, const float* scale, const float* bias)
    : GridLayer("int8", kernels, geometry, outputs, geometry.channels, quantization, kMaxActBits,
                scale, bias),
      planes_(kernels, geometry, outputs, true) {
  require(are_symmetric(weight, outputs * depth()), "a weight is -128; the range is -127..127");
  weight_ = AlignedBytes(parameter_bytes());
  kernels.pack_depthwise8(planes_.shape, static_cast<int32_t>(outputs), weight, weight_.data());
  offset_ = zero_offsets(weight, outputs, depth(), quantization.zero);
}

Layer::Memory Int8DepthwiseLayer::memory(const PatchSource& source, int threads,
                                         bool direct) const {
  const auto planes = planes_.find(source.height(), source.width());
  const int64_t block = depthwise_block(geometry_.channels, planes->plane, threads);
  const size_t copies = align64(static_cast<size_t>(block * planes->plane));
  const size_t scratch = TileOutput::scratch_bytes(outputs_, kernels_.row_tile, direct);
  return {0, std::max(copies + scratch, source.scratch_bytes())};
}

void Int8DepthwiseLayer::run_loaded(const Call& call) const {
  const PatchSource& source = call.source;
  const auto planes = planes_.find(source.height(), source.width());
  const size_t stride = memory(source, call.pool.threads(), call.direct).worker;
  const int64_t channels = geometry_.channels;
  const int64_t block = depthwise_block(channels, planes->plane, call.pool.threads());
  const int64_t blocks = (channels + block - 1) / block, image = source.height() * source.width();
  const uint8_t* const end = source.data() + channels * source.plane();
  const int64_t multiplier = planes_.shape.multiplier;
  const size_t weights = parameter_bytes() / static_cast<size_t>(outputs_);  // bytes of an output
  const double work = static_cast<double>(source.images() * planes->outputs * outputs_ * depth());
  call.pool.run(
      static_cast<size_t>(source.images() * blocks), work / kWorkPerMicrosecond,
      [&](size_t i, int worker) {
        uint8_t* const copies = call.workers + static_cast<size_t>(worker) * stride;
        uint8_t* const scratch = copies + align64(static_cast<size_t>(block * planes->plane));
        const int64_t n = static_cast<int64_t>(i) / blocks;
        const int64_t c = static_cast<int64_t>(i) % blocks * block;
        const int64_t count = std::min(block, channels - c);
        const uint8_t* const x = source.data() + c * source.plane() + n * image;
        const auto from = planes->source(x, source.plane(), count, source.data(), end, copies);
        const uint8_t* const weight =
            weight_.data() + static_cast<size_t>(c * multiplier) * weights;
        for (const DepthwisePlanes::Tile& t : planes->tiles) {
          const DepthwiseTile<uint8_t> tile{.planes = from.first + t.at,
                                            .plane = from.plane,
                                            .offset = planes->offset.data(),
                                            .masks = planes->masks(t.masks),
                                            .zero = static_cast<uint8_t>(quantization_.zero)};
          call.output.make(n * planes->outputs + t.first, t.count, scratch, c * multiplier, 0,
                           count * multiplier, [&](int64_t from, int64_t to, const Epilogue& e) {
                             kernels_.depthwise8(planes_.shape, weight, tile,
                                                 static_cast<int32_t>(from),
                                                 static_cast<int32_t>(to), e);
                           });
        }
      });
}

}  // namespace

std::unique_ptr<Layer> make_int8_depthwise(const Kernels& kernels, const ConvGeometry& geometry,
                                           int64_t outputs, const Quantization& quantization,
                                           const int8_t* weight, const float* scale,
                                           const float* bias) {
  return std::make_unique<Int8DepthwiseLayer>(kernels, geometry, outputs, quantization, weight,
                                              scale, bias);
}

}  // namespace lutra
