#include "engine/layers/int8_conv.h"

#include <algorithm>

#include "engine/core/limits.h"
#include "engine/layers/grid_layer.h"

namespace lutra {
namespace {

constexpr double kWorkPerMicrosecond = 2e5;  // multiply-adds of one core, a rough guess

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

class Int8ConvLayer : public GridLayer {
 public:
  Int8ConvLayer(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs,
                const Quantization& quantization, const int8_t* weight, const float* scale,
                const float* bias);
  size_t parameter_bytes() const override { return kernels_.conv8_bytes(shape_); }
  std::string method(int64_t) const override { return name_; }

 private:
  // The value is read as it is; padding comes with the quads.
  ConvGeometry source_geometry() const override { return {.channels = geometry_.channels}; }
  PatchSource quads(const PatchSource& source) const;
  Memory memory(const PatchSource& source, int threads, bool direct) const override;
  void run_loaded(const Call& call) const override;
  int64_t largest_sum() const override { return 127 * depth() * quantization_.qmax(); }

  // Scratch of a worker: offsets of rows, copies of a tile, the output's.
  size_t copy_bytes() const { return align64(kernels_.conv8_copy_bytes(shape_)); }
  static constexpr size_t kRowBytes = kMaxRowTile * sizeof(int32_t);
  static_assert(kRowBytes % 64 == 0);

  const Conv8Shape shape_;
  AlignedBytes weight_;
};

Int8ConvLayer::Int8ConvLayer(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs,
                             const Quantization& quantization, const int8_t* weight,
                             const float* scale, const float* bias)
    : GridLayer("int8", kernels, geometry, outputs, 1, quantization, kMaxActBits, scale, bias),
      shape_{.channels = static_cast<int32_t>(geometry.channels),
             .taps = static_cast<int32_t>(geometry.taps()),
             .outputs = static_cast<int32_t>(outputs)} {
  require(depth() <= kMaxInt8Depth, "too many inputs for exact 32-bit sums");
  require(are_symmetric(weight, outputs * depth()), "a weight is -128; the range is -127..127");
  weight_ = AlignedBytes(parameter_bytes());
  kernels.pack_conv8(shape_, weight, weight_.data());
  offset_ = zero_offsets(weight, outputs, depth(), quantization.zero);
}

PatchSource Int8ConvLayer::quads(const PatchSource& source) const {
  ConvGeometry g = geometry_;
  g.channels = (g.channels + 3) / 4;
  return PatchSource(g, source.images(), source.height(), source.width(), 4);
}

Layer::Memory Int8ConvLayer::memory(const PatchSource& source, int, bool direct) const {
  const PatchSource patches = quads(source);
  const size_t tile =
      kRowBytes + copy_bytes() + TileOutput::scratch_bytes(outputs_, kernels_.row_tile, direct);
  return {align64(patches.bytes()),
          std::max({tile, source.scratch_bytes(), patches.quad_scratch_bytes()})};
}

void Int8ConvLayer::run_loaded(const Call& call) const {
  PatchSource patches = quads(call.source);
  const size_t stride = memory(call.source, call.pool.threads(), call.direct).worker;
  patches.load_quads(call.source.data(), call.source.plane(), geometry_.channels,
                     static_cast<uint8_t>(quantization_.zero), call.shared, call.workers, stride,
                     call.pool);
  const int64_t rows = patches.rows(), tile = kernels_.row_tile, tiles = (rows + tile - 1) / tile;
  // Where tiles are few, their outputs are shared out too.
  const int threads = call.pool.threads();
  const bool split = threads > 1 && tiles < 4 * threads && tiles % threads != 0;
  const int64_t wanted = split ? (outputs_ + 2 * threads - 1) / (2 * threads) : outputs_;
  const int64_t step = round_up(wanted, kConvOutputs), parts = (outputs_ + step - 1) / step;
  const double work = static_cast<double>(rows * depth()) * static_cast<double>(outputs_);
  call.pool.run(
      static_cast<size_t>(tiles * parts), work / kWorkPerMicrosecond, [&](size_t i, int worker) {
        uint8_t* const memory = call.workers + static_cast<size_t>(worker) * stride;
        uint8_t *const copies = memory + kRowBytes, *const scratch = copies + copy_bytes();
        const int64_t first = static_cast<int64_t>(i) / parts * tile;
        const int64_t m = static_cast<int64_t>(i) % parts * step;
        const Patch patch =
            patches.tile(first, std::min(tile, rows - first), static_cast<int32_t>(tile),
                         reinterpret_cast<int32_t*>(memory));
        kernels_.copy_conv8(shape_, patch, copies);
        call.output.make(first, patch.rows, scratch, 0, m, std::min(outputs_, m + step),
                         [&](int64_t from, int64_t to, const Epilogue& e) {
                           kernels_.conv8(shape_, weight_.data(), patch, copies,
                                          static_cast<int32_t>(from), static_cast<int32_t>(to), e);
                         });
      });
}

}  // namespace

bool is_quad_conv(const Kernels& kernels, const ConvGeometry& g, int64_t groups) {
  if (!kernels.conv8) return false;
  const int64_t taps = g.taps(), missing_taps = round_up(taps, 3) - taps;
  const int64_t missing_channels = round_up(g.channels, 4) - g.channels;
  return groups == 1 && taps > 1 && taps <= kMaxConvTaps && 8 * missing_taps <= taps &&
         3 * missing_channels <= g.channels;
}

std::unique_ptr<Layer> make_int8_conv(const Kernels& kernels, const ConvGeometry& geometry,
                                      int64_t outputs, const Quantization& quantization,
                                      const int8_t* weight, const float* scale, const float* bias) {
  return std::make_unique<Int8ConvLayer>(kernels, geometry, outputs, quantization, weight, scale,
                                         bias);
}

}  // namespace lutra
