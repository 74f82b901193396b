#include "int8_layer.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace lutra {
namespace {

constexpr double kWorkPerMicrosecond = 2e5;  // multiply-adds of one core, a rough guess
constexpr int64_t kRowOutputs = 512;         // outputs of one work item where rows run alone

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace

Int8Layer::Int8Layer(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs,
                     int64_t groups, const Quantization& quantization, const int8_t* weight,
                     const float* scale, const float* bias)
    : kernels_(kernels),
      geometry_(geometry),
      outputs_(outputs),
      groups_(groups),
      quantization_(quantization),
      scale_(scale, scale + outputs),
      bias_(bias, bias + outputs) {
  auto require = [](bool ok, const std::string& what) {
    if (!ok) throw std::invalid_argument("int8 layer: " + what);
  };
  const Quantization& q = quantization;
  require(groups >= 1 && geometry.channels % groups == 0 && outputs % groups == 0,
          "groups must divide the channels and the outputs");
  require(q.bits >= 1 && q.bits <= 7,
          "activation bits must be 1..7, not " + std::to_string(q.bits));
  require(q.zero >= 0 && q.zero <= q.qmax() && q.scale > 0,
          "the zero point must be on the grid and its scale positive");
  const int64_t depth = geometry.depth() / groups, per_group = outputs / groups;
  require(depth <= (int64_t{1} << 31) / (127 * 128), "too many inputs for exact 32-bit sums");
  const int32_t d = static_cast<int32_t>(depth), m = static_cast<int32_t>(per_group);
  for (int64_t i = 0; i < outputs * depth; ++i) {
    require(weight[i] >= -127, "a weight is -128; the range is -127..127");
  }
  group_bytes_ = align64(kernels.dense8_bytes(d, m));
  weight_ = AlignedBytes(group_bytes_ * static_cast<size_t>(groups));
  for (int64_t g = 0; g < groups; ++g) {
    kernels.pack_dense8(d, m, weight + g * per_group * depth,
                        weight_.data() + static_cast<size_t>(g) * group_bytes_);
  }
  for (int64_t i = 0; i < outputs; ++i) {
    int32_t sum = 0;
    for (int64_t k = 0; k < depth; ++k) sum += weight[i * depth + k];
    offset_.push_back(-q.zero * sum);
  }
}

Fold Int8Layer::fold(Clamp clamp, const Quantization& grid) const {
  const int64_t depth = geometry_.depth() / groups_;  // |x - zero| <= qmax
  return fold_quantization(scale_, bias_, clamp, make_grid(grid),
                           127 * depth * quantization_.qmax());
}

// Workspace: planes, gathered values of all tiles (where tiles are few and shared out), workers.
struct Int8Layer::Sizes {
  size_t planes, gathered, shared, worker;
  int64_t tiles;
  bool split;

  Sizes(const Int8Layer& l, const PatchSource& source, int threads, bool direct) {
    const int64_t tile = l.kernels_.row_tile, depth = l.geometry_.depth() / l.groups_;
    tiles = (source.rows() + tile - 1) / tile;
    split = threads > 1 && l.groups_ == 1 && tiles < 4 * threads && tiles % threads != 0;
    planes = align64(source.bytes());
    gathered = align64(l.kernels_.gather8_bytes(static_cast<int32_t>(depth)));
    shared = split ? static_cast<size_t>(tiles) * gathered : 0;
    const size_t scratch = direct ? 0 : TileOutput::scratch_bytes(l.outputs_, l.kernels_.row_tile);
    const size_t row =
        align64(static_cast<size_t>(depth)) + align64(kRowOutputs * (2 * sizeof(float) + 1));
    worker = std::max({align64(kMaxRowTile * sizeof(int32_t)) + (split ? 0 : gathered) + scratch,
                       source.scratch_bytes(), l.by_row(source.rows()) ? row : 0});
  }
};

size_t Int8Layer::workspace_bytes(int64_t n, int64_t h, int64_t w, int threads, bool direct) const {
  const PatchSource source(geometry_, n, h, w);
  const Sizes s(*this, source, threads, direct);
  return s.planes + s.shared + static_cast<size_t>(threads) * s.worker;
}

void Int8Layer::run(const ByteView& x, const LayerOutput& out, uint8_t* workspace,
                    ThreadPool& pool) const {
  PatchSource source(geometry_, x.n, x.h, x.w);
  const Sizes s(*this, source, pool.threads(), TileOutput::direct(out.view));
  uint8_t* const shared = workspace + s.planes;
  uint8_t* const workers = shared + s.shared;
  source.load(x, quantization_.zero, workspace, workers, s.worker, pool);
  const TileOutput output(out, kernels_, offset_.data(), scale_.data(), bias_.data());
  if (by_row(source.rows())) return run_rows(source, output, workers, s.worker, pool);

  const int64_t rows = source.rows(), tile = kernels_.row_tile;
  const int64_t channels = geometry_.channels / groups_, per_group = outputs_ / groups_;
  const int32_t depth = static_cast<int32_t>(geometry_.depth() / groups_),
                taps = static_cast<int32_t>(geometry_.taps()),
                group_outputs = static_cast<int32_t>(per_group);
  auto patch = [&](int64_t index, uint8_t* memory) {
    const int64_t first = index * tile, count = std::min(tile, rows - first);
    return source.tile(first, count, static_cast<int32_t>(tile),
                       reinterpret_cast<int32_t*>(memory));
  };
  const double work = static_cast<double>(rows * depth) * static_cast<double>(outputs_);
  if (!s.split) {
    pool.run(static_cast<size_t>(s.tiles), work / kWorkPerMicrosecond, [&](size_t i, int worker) {
      uint8_t* const memory = workers + static_cast<size_t>(worker) * s.worker;
      uint8_t* const gathered = memory + align64(kMaxRowTile * sizeof(int32_t));
      uint8_t* const scratch = gathered + s.gathered;
      Patch p = patch(static_cast<int64_t>(i), memory);
      const int64_t first = static_cast<int64_t>(i) * tile;
      for (int64_t g = 0; g < groups_; ++g, p.planes += channels * p.plane) {
        kernels_.gather8(depth, taps, p, gathered);
        kernels_.dense8(depth, group_outputs,
                        weight_.data() + static_cast<size_t>(g) * group_bytes_, gathered, 0,
                        group_outputs, output.begin(first, p.rows, scratch, g * per_group));
        output.end(first, p.rows, scratch, g * per_group, per_group);
      }
    });
    return;
  }
  pool.run(static_cast<size_t>(s.tiles), 0, [&](size_t i, int worker) {
    const Patch p =
        patch(static_cast<int64_t>(i), workers + static_cast<size_t>(worker) * s.worker);
    kernels_.gather8(depth, taps, p, shared + i * s.gathered);
  });
  const int64_t wanted = (outputs_ + 2 * pool.threads() - 1) / (2 * pool.threads());
  const int64_t step = round_up(wanted, std::max<int64_t>(16, kernels_.output_tile));
  const int64_t parts = (outputs_ + step - 1) / step;
  pool.run(
      static_cast<size_t>(s.tiles * parts), work / kWorkPerMicrosecond, [&](size_t i, int worker) {
        uint8_t* const scratch = workers + static_cast<size_t>(worker) * s.worker +
                                 align64(kMaxRowTile * sizeof(int32_t));
        const int64_t index = static_cast<int64_t>(i) / parts;
        const int64_t m = static_cast<int64_t>(i) % parts * step;
        const int64_t end = std::min(outputs_, m + step);
        const int64_t first = index * tile, count = std::min(tile, rows - first);
        kernels_.dense8(depth, group_outputs, weight_.data(),
                        shared + static_cast<size_t>(index) * s.gathered, static_cast<int32_t>(m),
                        static_cast<int32_t>(end), output.begin(first, count, scratch));
        output.end(first, count, scratch, m, end - m);
      });
}

void Int8Layer::run_rows(const PatchSource& source, const TileOutput& output, uint8_t* workers,
                         size_t stride, ThreadPool& pool) const {
  const int64_t rows = source.rows(), depth = geometry_.depth();
  const int64_t parts = (outputs_ + kRowOutputs - 1) / kRowOutputs;
  const size_t x_bytes = align64(static_cast<size_t>(depth));
  const double work = static_cast<double>(rows * depth) * static_cast<double>(outputs_);
  pool.run(static_cast<size_t>(rows * parts), work / kWorkPerMicrosecond,
           [&](size_t i, int worker) {
             uint8_t* const x = workers + static_cast<size_t>(worker) * stride;
             const int64_t r = static_cast<int64_t>(i) / parts;
             const int64_t m = static_cast<int64_t>(i) % parts * kRowOutputs;
             const int64_t count = std::min(kRowOutputs, outputs_ - m);
             int32_t row;
             const Patch p = source.tile(r, 1, 1, &row);
             for (int64_t d = 0; d < depth; ++d) x[d] = p.planes[d * p.plane + p.tap[0]];
             std::fill(x + depth, x + x_bytes, uint8_t{0});
             int32_t* const sums = reinterpret_cast<int32_t*>(x + x_bytes);
             kernels_.dense8_row(static_cast<int32_t>(depth), static_cast<int32_t>(outputs_),
                                 weight_.data(), x, static_cast<int32_t>(m),
                                 static_cast<int32_t>(m + count), sums);
             output.row(r, sums, m, count, reinterpret_cast<uint8_t*>(sums + kRowOutputs));
           });
}

}  // namespace lutra
