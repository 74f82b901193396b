#include "pq_layer.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace lutra {
namespace {

size_t align64(size_t bytes) { return (bytes + 63) / 64 * 64; }

constexpr int64_t kPatchBytes = 16384;  // of a tile's patch: half of a small first-level cache
constexpr int64_t kFillChannels = 32;   // channels quantised by one work item
constexpr int64_t kFillRows = 64;       // rows of channels transposed by one work item

// Rough speeds of one AVX-512 core, to guess how long a job takes.
constexpr double kFillPerMicrosecond = 2e3;    // values quantised
constexpr double kWorkPerMicrosecond = 1.5e5;  // centroid values compared and table entries added
constexpr double kGradPerMicrosecond = 5e3;    // table entries added, in training

// Bytes that quantize_planes() needs for each worker.
size_t fill_scratch(int64_t w) {
  return static_cast<size_t>(std::max(w, kFillRows) * kFillChannels);
}

// The distance between neighbouring rows in memory; 0 where it is not the same for all.
int64_t row_step(const ImageView& v) {
  const int64_t sizes[] = {v.w, v.h, v.n}, strides[] = {v.sw, v.sh, v.sn};
  int64_t step = 1, rows = 1;
  for (int i = 0; i < 3; ++i) {
    if (sizes[i] == 1) continue;
    if (rows == 1) step = strides[i];
    if (strides[i] != step * rows) return 0;
    rows *= sizes[i];
  }
  return step;
}

// Quantises the whole input into padded planes.
void quantize_planes(const Kernels& kernels, const PaddedPlanes<uint8_t>& planes,
                     const Quantization& q, const ImageView& x, uint8_t* to, uint8_t* scratch,
                     size_t scratch_per_worker, ThreadPool& pool) {
  auto convert = [&](const float* from, int64_t count, uint8_t* target) {
    kernels.quantize(from, static_cast<size_t>(count), q.scale, q.zero, q.qmax(), target);
  };
  const int64_t blocks = (x.c + kFillChannels - 1) / kFillChannels;
  const double fill_time = static_cast<double>(x.n * x.c * x.h * x.w) / kFillPerMicrosecond;
  const int64_t step = planes.plain() ? row_step(x) : 0, rows = x.n * x.h * x.w;
  if (step != 0 && x.sc == 1) {  // rows of channels: a transpose
    const int64_t row_blocks = (rows + kFillRows - 1) / kFillRows;
    pool.run(static_cast<size_t>(row_blocks * blocks), fill_time, [&](size_t item, int worker) {
      const int64_t row = static_cast<int64_t>(item) / blocks * kFillRows;
      const int64_t channel = static_cast<int64_t>(item) % blocks * kFillChannels;
      const int64_t count = std::min(kFillRows, rows - row);
      const int64_t channels = std::min(kFillChannels, x.c - channel);
      uint8_t* const block = scratch + worker * scratch_per_worker;
      for (int64_t r = 0; r < count; ++r) {
        convert(x.data + (row + r) * step + channel, channels, block + r * channels);
      }
      for (int64_t c = 0; c < channels; ++c) {
        uint8_t* const plane = to + (channel + c) * rows + row;
        for (int64_t r = 0; r < count; ++r) plane[r] = block[r * channels + c];
      }
    });
    return;
  }
  if (step == 1) {
    pool.run(static_cast<size_t>(x.c), fill_time, [&](size_t c, int) {
      convert(x.data + static_cast<int64_t>(c) * x.sc, rows, to + static_cast<int64_t>(c) * rows);
    });
    return;
  }
  pool.run(static_cast<size_t>(x.n * blocks), fill_time, [&](size_t item, int worker) {
    const int64_t n = static_cast<int64_t>(item) / blocks;
    const int64_t first = static_cast<int64_t>(item) % blocks * kFillChannels;
    const int64_t last = std::min(x.c, first + kFillChannels);
    planes.fill(to, x, n, first, last, static_cast<uint8_t>(q.zero),
                scratch + worker * scratch_per_worker, convert);
  });
}

// Writes the tile (outputs, row_tile) to an output whose rows are not consecutive, and does what
// the kernel's epilogue would have done after the bias.
void scatter(const float* tile, int64_t row_tile, int64_t first, int64_t rows,
             const PqLayer::Call& call) {
  const ImageView& out = call.output;
  constexpr int64_t kBlock = 16;  // outputs at a time, so that their lines stay in the cache
  const int64_t step = out.sc;
  for (int64_t block = 0; block < out.c; block += kBlock) {
    const int64_t count = std::min(out.c, block + kBlock) - block;
    int64_t x = first % out.w, y = first / out.w % out.h, n = first / (out.w * out.h);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = n * out.sn + y * out.sh + x * out.sw + block * step;
      const float* const from = tile + block * row_tile + r;
      float* const to = out.data + at;
      if (call.residual || call.clamp.on) {
        for (int64_t m = 0; m < count; ++m) {
          float v = from[m * row_tile];
          if (call.residual) v += call.residual[at + m * step];
          to[m * step] = call.clamp(v);
        }
      } else {
        for (int64_t m = 0; m < count; ++m) to[m * step] = from[m * row_tile];
      }
      if (++x == out.w) {
        x = 0;
        if (++y == out.h) {
          y = 0;
          ++n;
        }
      }
    }
  }
}

}  // namespace

PqLayer::PqLayer(const Kernels& kernels, const PqShape& shape, const ConvGeometry& geometry,
                 const Quantization& quantization, const uint8_t* centroids, const int8_t* tables,
                 const float* scale, const float* bias)
    : kernels_(kernels), shape_(shape), geometry_(geometry), quantization_(quantization) {
  auto require = [](bool ok, const std::string& what) {
    if (!ok) throw std::invalid_argument("product-quantised layer: " + what);
  };
  const int32_t k = shape.centroids;
  require(k == 8 || k == 16 || k == 32 || k == 64,
          "K must be 8, 16, 32 or 64, not " + std::to_string(k));
  require(shape.dim >= 1 && shape.dim <= 64, "V must be 1..64, not " + std::to_string(shape.dim));
  require(shape.outputs >= 1, "it has no outputs");
  require(quantization.bits >= 1 && quantization.bits <= 7,
          "activation bits must be 1..7, not " + std::to_string(quantization.bits));
  require(quantization.zero >= 0 && quantization.zero <= quantization.qmax(),
          "zero point " + std::to_string(quantization.zero) + " is outside 0.." +
              std::to_string(quantization.qmax()));
  require(quantization.scale > 0, "the activation scale must be positive");
  const int64_t books = (geometry.depth() + shape.dim - 1) / shape.dim;
  require(books == shape.books,
          "it needs " + std::to_string(books) + " codebooks, not " + std::to_string(shape.books));
  require(shape.books < (1 << 24), "too many codebooks for exact 32-bit sums");
  const size_t values = static_cast<size_t>(shape.books) * k * shape.dim;
  for (size_t i = 0; i < values; ++i) {
    require(centroids[i] <= quantization.qmax(), "centroid value " + std::to_string(centroids[i]) +
                                                     " is above " +
                                                     std::to_string(quantization.qmax()));
  }
  books_per_patch_ = static_cast<int32_t>(
      std::clamp<int64_t>(kPatchBytes / (int64_t{shape.dim} * kernels.row_tile), 1, shape.books));
  centroids_ = AlignedBytes(kernels.centroid_bytes(shape));
  kernels.pack_centroids(shape, centroids, centroids_.data());
  tables_ = AlignedBytes(kernels.table_bytes(shape));
  kernels.pack_tables(shape, tables, tables_.data());
  scale_.assign(scale, scale + shape.outputs);
  bias_.assign(bias, bias + shape.outputs);
}

PqLayer::PqLayer(const Kernels& kernels, const PqShape& shape, const ConvGeometry& geometry,
                 const Quantization& quantization, const int32_t* splits, const uint8_t* thresholds,
                 const int8_t* tables, const float* scale, const float* bias)
    : kernels_(kernels), shape_(shape), geometry_(geometry), quantization_(quantization) {
  auto require = [](bool ok, const std::string& what) {
    if (!ok) throw std::invalid_argument("product-quantised layer: " + what);
  };
  const int32_t k = shape.centroids;
  require(k == 8 || k == 16 || k == 32 || k == 64,
          "K must be 8, 16, 32 or 64, not " + std::to_string(k));
  require((1 << shape.dim) == k, "a tree of K leaves needs log2(K) splits");
  require(shape.outputs >= 1, "it has no outputs");
  require(quantization.bits >= 1 && quantization.bits <= 7,
          "activation bits must be 1..7, not " + std::to_string(quantization.bits));
  require(quantization.zero >= 0 && quantization.zero <= quantization.qmax(),
          "the zero point is outside the grid");
  require(quantization.scale > 0, "the activation scale must be positive");
  require(shape.books >= 1 && shape.books < (1 << 17), "too many codebooks for exact sums");
  splits_.assign(splits, splits + static_cast<size_t>(shape.books) * shape.dim);
  for (const int32_t split : splits_) {
    require(split >= 0 && split < geometry.depth(), "a split is outside the row");
  }
  books_per_patch_ = static_cast<int32_t>(
      std::clamp<int64_t>(kPatchBytes / (int64_t{shape.dim} * kernels.row_tile), 1, shape.books));
  centroids_ = AlignedBytes(static_cast<size_t>(shape.books) * 64);
  std::memset(centroids_.data(), 0, static_cast<size_t>(shape.books) * 64);
  for (int32_t b = 0; b < shape.books; ++b) {
    for (int32_t i = 0; i < k - 1; ++i) {
      const uint8_t threshold = thresholds[b * (k - 1) + i];
      require(threshold <= quantization.qmax() + 1, "a threshold is above the grid");
      centroids_.data()[b * 64 + i] = threshold;
    }
  }
  tables_ = AlignedBytes(kernels.table_bytes(shape));
  kernels.pack_tables(shape, tables, tables_.data());
  scale_.assign(scale, scale + shape.outputs);
  bias_.assign(bias, bias + shape.outputs);
}

PqLayer::Sizes PqLayer::sizes(const PaddedPlanes<uint8_t>& planes, int64_t w) const {
  Sizes s;
  const size_t tile = static_cast<size_t>(kernels_.row_tile);
  const size_t books =
      static_cast<size_t>((shape_.books + kernels_.book_tile - 1) / kernels_.book_tile) *
      kernels_.book_tile;
  s.planes = align64(static_cast<size_t>(planes.elements()));
  s.patch = align64(std::max<size_t>(
      static_cast<size_t>(books_per_patch_) * shape_.dim * tile + PaddedPlanes<uint8_t>::kSlack,
      fill_scratch(w)));
  s.codes = align64(books * tile);
  s.tile = align64(static_cast<size_t>(shape_.outputs) * tile * sizeof(float));
  s.worker = s.patch + 2 * s.codes + s.tile;
  return s;
}

size_t PqLayer::workspace_bytes(int64_t n, int64_t h, int64_t w, int threads) const {
  const PaddedPlanes<uint8_t> planes(geometry_, n, h, w);
  const Sizes s = sizes(planes, w);
  return s.planes + static_cast<size_t>(threads) * s.worker;
}

void PqLayer::run(const Call& call, uint8_t* workspace, ThreadPool& pool) const {
  const ImageView& x = call.input;
  const PaddedPlanes<uint8_t> planes(geometry_, x.n, x.h, x.w);
  const Sizes s = sizes(planes, x.w);
  uint8_t* const quantized = workspace;
  uint8_t* const workers = workspace + s.planes;
  quantize_planes(kernels_, planes, quantization_, x, quantized, workers, s.worker, pool);

  const int64_t tile = kernels_.row_tile, rows = planes.rows(), depth = geometry_.depth();
  const ImageView& out = call.output;
  const int64_t pixels = out.h * out.w;
  const bool whole = row_step(out) == 1;                 // rows follow each other everywhere
  const bool by_image = out.sw == 1 && out.sh == out.w;  // or at least within an image
  const size_t tiles = static_cast<size_t>((rows + tile - 1) / tile);
  const double work =
      static_cast<double>(rows) * shape_.books * (shape_.centroids * shape_.dim + shape_.outputs);
  pool.run(tiles, work / kWorkPerMicrosecond, [&](size_t index, int worker) {
    uint8_t* const patch = workers + static_cast<size_t>(worker) * s.worker;
    uint8_t* const codes = patch + s.patch;
    uint8_t* const arranged = codes + s.codes;
    float* const outputs = reinterpret_cast<float*>(arranged + s.codes);
    const int64_t first = static_cast<int64_t>(index) * tile;
    const int64_t count = std::min(tile, rows - first);
    const auto runs = planes.runs(first, count);
    if (count < tile) std::memset(patch, 0, s.patch);  // the lanes of missing rows
    for (int32_t b = 0; b < shape_.books; b += books_per_patch_) {
      const int32_t end = std::min(shape_.books, b + books_per_patch_);
      if (!splits_.empty()) {
        for (int32_t i = b * shape_.dim; i < end * shape_.dim; ++i) {
          planes.gather(quantized, runs, splits_[i], splits_[i] + 1, tile,
                        patch + (i - b * shape_.dim) * tile);
        }
        kernels_.encode_tree(shape_, centroids_.data(), b, end, patch, codes + b * tile);
        continue;
      }
      const int64_t from = int64_t{b} * shape_.dim, to = std::min(depth, int64_t{end} * shape_.dim);
      planes.gather(quantized, runs, from, to, tile, patch);
      // A last sub-vector that is shorter: its missing values are zero.
      std::memset(patch + (to - from) * tile, 0,
                  static_cast<size_t>((int64_t{end} * shape_.dim - to) * tile));
      kernels_.encode(shape_, centroids_.data(), b, end, patch, codes + b * tile);
    }
    std::memset(codes + shape_.books * tile, 0, s.codes - static_cast<size_t>(shape_.books * tile));
    if (call.codes) {
      for (int32_t b = 0; b < shape_.books; ++b) {
        std::memcpy(call.codes + b * rows + first, codes + b * tile, static_cast<size_t>(count));
      }
    }
    const int64_t image = first / pixels;
    const bool direct = whole || (by_image && image == (first + count - 1) / pixels);
    const int64_t at = whole ? first : image * out.sn + first % pixels;
    Epilogue e{.scale = scale_.data(),
               .bias = bias_.data(),
               .residual = direct && call.residual ? call.residual + at : nullptr,
               .out = direct ? out.data + at : outputs,
               .residual_stride = static_cast<size_t>(out.sc),
               .out_stride = static_cast<size_t>(direct ? out.sc : tile),
               .rows = static_cast<int32_t>(count),
               .clamp = direct && call.clamp.on,
               .low = call.clamp.low,
               .high = call.clamp.high};
    kernels_.lookup(shape_, tables_.data(), codes, arranged, e);
    if (!direct) scatter(outputs, tile, first, count, call);
  });
}

void table_gradient(const Kernels& kernels, const PqShape& shape, const uint8_t* codes,
                    const ImageView& gradient, float* grad, ThreadPool& pool) {
  const int64_t rows = gradient.n * gradient.h * gradient.w;
  const size_t cell = static_cast<size_t>(shape.centroids) * shape.outputs;
  // Books per item: their gradients stay in the first-level cache while the rows stream by.
  // At least one item per thread.
  const int64_t share = (shape.books + pool.threads() - 1) / pool.threads();
  const int64_t group =
      std::clamp<int64_t>(24576 / static_cast<int64_t>(cell * sizeof(float)), 1, share);
  const int64_t groups = (shape.books + group - 1) / group;
  const bool consecutive = gradient.sc == 1 && gradient.sw == gradient.c &&
                           gradient.sh == gradient.w * gradient.sw &&
                           gradient.sn == gradient.h * gradient.sh;
  constexpr int64_t kRows = 64;
  const double work = static_cast<double>(rows) * shape.books * shape.outputs;
  pool.run(static_cast<size_t>(groups), work / kGradPerMicrosecond, [&](size_t item, int) {
    const int64_t first = static_cast<int64_t>(item) * group;
    const int64_t books = std::min<int64_t>(group, shape.books - first);
    float* const target = grad + first * static_cast<int64_t>(cell);
    std::fill(target, target + books * static_cast<int64_t>(cell), 0.0f);
    std::vector<float> buffer(consecutive ? 0 : static_cast<size_t>(kRows * shape.outputs));
    // Planes of codes are often a power of two apart and would fight for the same cache lines.
    std::vector<uint8_t> tile(static_cast<size_t>(kRows * books));
    for (int64_t r = 0; r < rows; r += kRows) {
      const int64_t count = std::min(kRows, rows - r);
      const float* block = gradient.data + r * gradient.c;
      if (!consecutive) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t x = (r + i) % gradient.w, y = (r + i) / gradient.w % gradient.h;
          const int64_t n = (r + i) / (gradient.w * gradient.h);
          const float* from = gradient.data + n * gradient.sn + y * gradient.sh + x * gradient.sw;
          for (int64_t m = 0; m < gradient.c; ++m)
            buffer[i * gradient.c + m] = from[m * gradient.sc];
        }
        block = buffer.data();
      }
      for (int64_t b = 0; b < books; ++b) {
        std::memcpy(tile.data() + b * kRows, codes + (first + b) * rows + r,
                    static_cast<size_t>(count));
      }
      kernels.table_grad(tile.data(), kRows, static_cast<int32_t>(books), shape.centroids, block,
                         static_cast<int32_t>(count), shape.outputs, target);
    }
  });
}

void cluster_sums(const Kernels& kernels, const PqShape& shape, const ConvGeometry& geometry,
                  const Quantization& quantization, const ImageView& input, const uint8_t* codes,
                  int64_t* sums, int64_t* counts, ThreadPool& pool) {
  const PaddedPlanes<uint8_t> planes(geometry, input.n, input.h, input.w);
  const size_t scratch = fill_scratch(input.w);
  AlignedBytes memory(align64(static_cast<size_t>(planes.elements())) +
                      scratch * static_cast<size_t>(pool.threads()));
  uint8_t* const quantized = memory.data();
  quantize_planes(kernels, planes, quantization, input, quantized,
                  quantized + align64(static_cast<size_t>(planes.elements())), scratch, pool);
  constexpr int64_t kRows = 64;
  const int64_t rows = planes.rows(), depth = geometry.depth();
  const double work = static_cast<double>(rows) * shape.books * shape.dim;
  pool.run(static_cast<size_t>(shape.books), work / kGradPerMicrosecond, [&](size_t book, int) {
    const int64_t b = static_cast<int64_t>(book), from = b * shape.dim;
    const int64_t to = std::min(depth, from + shape.dim);
    int64_t* const count = counts + b * shape.centroids;
    int64_t* const sum = sums + b * shape.centroids * shape.dim;
    std::fill(count, count + shape.centroids, 0);
    std::fill(sum, sum + shape.centroids * shape.dim, 0);
    std::vector<uint8_t> patch(
        static_cast<size_t>(shape.dim * kRows + PaddedPlanes<uint8_t>::kSlack));
    for (int64_t r = 0; r < rows; r += kRows) {
      const int64_t n = std::min(kRows, rows - r);
      planes.gather(quantized, planes.runs(r, n), from, to, kRows, patch.data());
      for (int64_t i = 0; i < n; ++i) {
        const uint8_t code = codes[b * rows + r + i];
        ++count[code];
        for (int64_t v = 0; v < to - from; ++v) sum[code * shape.dim + v] += patch[v * kRows + i];
      }
    }
  });
}

}  // namespace lutra
