#include "engine/layers/gathered.h"

#include <algorithm>

namespace lutra {
namespace {

constexpr double kWorkPerMicrosecond = 2e5;  // multiply-adds of one core, a rough guess
constexpr int64_t kRowOutputs = 512;         // outputs of one work item where rows run alone

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace

// Workspace: gathered values of all tiles (where tiles are few and shared out), workers.
struct GatheredLayer::Sizes {
  size_t gathered, shared, worker;
  int64_t tiles;
  bool split;

  Sizes(const GatheredLayer& l, const PatchSource& source, int threads, bool direct) {
    const int64_t tile = l.kernels_.row_tile;
    tiles = (source.rows() + tile - 1) / tile;
    split = threads > 1 && l.groups_ == 1 && tiles < 4 * threads && tiles % threads != 0;
    gathered = align64(l.gathered_bytes());
    shared = split ? static_cast<size_t>(tiles) * gathered : 0;
    const size_t scratch = TileOutput::scratch_bytes(l.outputs_, l.kernels_.row_tile, direct);
    const size_t row =
        align64(static_cast<size_t>(l.depth())) + align64(kRowOutputs * (2 * sizeof(float) + 1));
    worker = std::max({align64(kMaxRowTile * sizeof(int32_t)) + (split ? 0 : gathered) + scratch,
                       source.scratch_bytes(), l.by_row(source.rows()) ? row : 0});
  }
};

Layer::Memory GatheredLayer::memory(const PatchSource& source, int threads, bool direct) const {
  const Sizes s(*this, source, threads, direct);
  return {s.shared, s.worker};
}

void GatheredLayer::run_loaded(const Call& call) const {
  const PatchSource& source = call.source;
  const TileOutput& output = call.output;
  uint8_t *const shared = call.shared, *const workers = call.workers;
  ThreadPool& pool = call.pool;
  const Sizes s(*this, source, pool.threads(), call.direct);
  if (by_row(source.rows())) return run_rows(call, s.worker);
  const int64_t rows = source.rows(), tile = kernels_.row_tile;
  const int64_t channels = geometry_.channels / groups_, per_group = group_outputs();
  auto patch = [&](int64_t index, uint8_t* memory) {
    const int64_t first = index * tile, count = std::min(tile, rows - first);
    return source.tile(first, count, static_cast<int32_t>(tile),
                       reinterpret_cast<int32_t*>(memory));
  };
  const double work = static_cast<double>(rows * depth()) * static_cast<double>(outputs_);
  if (!s.split) {
    pool.run(static_cast<size_t>(s.tiles), work / kWorkPerMicrosecond, [&](size_t i, int worker) {
      uint8_t* const memory = workers + static_cast<size_t>(worker) * s.worker;
      uint8_t* const gathered = memory + align64(kMaxRowTile * sizeof(int32_t));
      uint8_t* const scratch = gathered + s.gathered;
      const Patch all = patch(static_cast<int64_t>(i), memory);
      const int64_t first = static_cast<int64_t>(i) * tile;
      output.make_groups(first, all.rows, scratch, groups_, per_group,
                         [&](int64_t group, int64_t from, int64_t to, const Epilogue& e) {
                           if (from == 0) {
                             Patch p = all;
                             p.planes += group * channels * p.plane;
                             gather(p, gathered);
                           }
                           multiply(group, gathered, from, to, e);
                         });
    });
    return;
  }
  pool.run(static_cast<size_t>(s.tiles), 0, [&](size_t i, int worker) {
    const Patch p =
        patch(static_cast<int64_t>(i), workers + static_cast<size_t>(worker) * s.worker);
    gather(p, shared + i * s.gathered);
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
        output.make(first, count, scratch, 0, m, end,
                    [&](int64_t from, int64_t to, const Epilogue& e) {
                      multiply(0, shared + static_cast<size_t>(index) * s.gathered, from, to, e);
                    });
      });
}

void GatheredLayer::run_rows(const Call& call, size_t stride) const {
  const PatchSource& source = call.source;
  const int64_t rows = source.rows(), depth = geometry_.depth();
  const int64_t parts = (outputs_ + kRowOutputs - 1) / kRowOutputs;
  const size_t x_bytes = align64(static_cast<size_t>(depth));
  const double work = static_cast<double>(rows * depth) * static_cast<double>(outputs_);
  call.pool.run(
      static_cast<size_t>(rows * parts), work / kWorkPerMicrosecond, [&](size_t i, int worker) {
        uint8_t* const x = call.workers + static_cast<size_t>(worker) * stride;
        const int64_t r = static_cast<int64_t>(i) / parts;
        const int64_t m = static_cast<int64_t>(i) % parts * kRowOutputs;
        const int64_t count = std::min(kRowOutputs, outputs_ - m);
        int32_t row;
        const Patch p = source.tile(r, 1, 1, &row);
        for (int64_t d = 0; d < depth; ++d) x[d] = p.planes[d * p.plane + p.tap[0]];
        std::fill(x + depth, x + x_bytes, uint8_t{0});
        int32_t* const sums = reinterpret_cast<int32_t*>(x + x_bytes);
        multiply_row(x, m, m + count, sums);
        call.output.row(r, sums, m, count, reinterpret_cast<uint8_t*>(sums + kRowOutputs));
      });
}

}  // namespace lutra
