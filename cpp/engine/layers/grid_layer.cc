#include "engine/layers/grid_layer.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace lutra {
namespace {

constexpr int64_t kQuantizedBlock = 1 << 14;      // floats of one work item
constexpr double kQuantizedPerMicrosecond = 4e3;  // floats of one core, a rough guess

}  // namespace

GridLayer::GridLayer(std::string name, const Kernels& kernels, const ConvGeometry& geometry,
                     int64_t outputs, int64_t groups, const Quantization& quantization,
                     int most_bits, const float* scale, const float* bias)
    : Layer(std::move(name), kernels, geometry, outputs, quantization, most_bits, scale, bias),
      groups_(groups) {
  require(groups >= 1 && geometry.channels % groups == 0 && outputs % groups == 0,
          "groups must divide the channels and the outputs");
}

void GridLayer::run(const ImageView& x, const LayerOutput& output, uint8_t* codes,
                    uint8_t* workspace, ThreadPool& pool) const {
  if (!codes) return Layer::run(x, output, nullptr, workspace, pool);
  const Grid grid = make_grid(quantization_);
  const int64_t size = x.pixels() * x.c;
  pool.run(static_cast<size_t>((size + kQuantizedBlock - 1) / kQuantizedBlock),
           static_cast<double>(size) / kQuantizedPerMicrosecond, [&](size_t i, int) {
             const int64_t first = static_cast<int64_t>(i) * kQuantizedBlock;
             const int64_t n = std::min(kQuantizedBlock, size - first);
             kernels_.quantize(x.data + first, static_cast<size_t>(n), grid, codes + first);
           });
  // Lines that can be copied as they are. Without padding they would be read in place, but what a
  // caller gives has no slack.
  if (x.sw == 1 && x.sh == x.w && geometry_.taps() > 1) {
    Layer::run(ByteView{codes, x.n, x.c, x.h, x.w, x.sn, x.sc, x.sh, x.sw}, output, workspace,
               pool);
  } else {
    Layer::run(x, output, nullptr, workspace, pool);
  }
}

void GridLayer::check_codes(const ImageView& x, int64_t, const Codes& codes) const {
  const int64_t shape[] = {x.n, x.c, x.h, x.w}, strides[] = {x.sn, x.sc, x.sh, x.sw};
  bool fits = codes.shape.size() == 4;
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, length
  for (size_t i = 0; fits && i < 4; ++i) {
    fits = codes.shape[i] == shape[i] && (shape[i] <= 1 || codes.strides[i] == strides[i]);
    if (shape[i] > 1) axes.push_back({strides[i], shape[i]});
  }
  int64_t next = 1;
  for (size_t i = 0; fits && i < axes.size(); ++i) {  // the next longer one
    const auto axis = std::find_if(axes.begin(), axes.end(),
                                   [next](const auto& one) { return one.first == next; });
    fits = axis != axes.end();
    if (fits) next *= axis->second;
  }
  require(fits, "indices need the shape and the strides of x, and both without gaps");
}

}  // namespace lutra
