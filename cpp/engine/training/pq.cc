#include "engine/training/pq.h"

#include <algorithm>

#include "engine/core/memory.h"

namespace lutra {
namespace {

constexpr double kGradPerMicrosecond = 5e3;  // table entries added: a rough guess for one core
constexpr double kPairsPerMicrosecond = 1e3;

}  // namespace

void table_gradient(const Kernels& kernels, const PqShape& shape, const uint8_t* codes,
                    const ImageView& gradient, float* grad, ThreadPool& pool) {
  const int64_t rows = gradient.n * gradient.h * gradient.w;
  const size_t cell = static_cast<size_t>(shape.centroids) * shape.outputs;
  // Codebooks per item: their gradients stay in the first-level cache while the rows stream by.
  // At least one item per thread.
  const int64_t share = (shape.codebooks + pool.threads() - 1) / pool.threads();
  const int64_t group =
      std::clamp<int64_t>(24576 / static_cast<int64_t>(cell * sizeof(float)), 1, share);
  const int64_t groups = (shape.codebooks + group - 1) / group;
  const bool consecutive = gradient.sc == 1 && gradient.sw == gradient.c &&
                           gradient.sh == gradient.w * gradient.sw &&
                           gradient.sn == gradient.h * gradient.sh;
  constexpr int64_t kRows = 64;
  const double work = static_cast<double>(rows) * shape.codebooks * shape.outputs;
  pool.run(static_cast<size_t>(groups), work / kGradPerMicrosecond, [&](size_t item, int) {
    const int64_t first = static_cast<int64_t>(item) * group;
    const int64_t codebooks = std::min<int64_t>(group, shape.codebooks - first);
    float* const target = grad + first * static_cast<int64_t>(cell);
    std::fill(target, target + codebooks * static_cast<int64_t>(cell), 0.0f);
    std::vector<float> buffer(consecutive ? 0 : static_cast<size_t>(kRows * shape.outputs));
    // Planes of codes are often a power of two apart and would fight for the same cache lines.
    std::vector<uint8_t> tile(static_cast<size_t>(kRows * codebooks));
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
      for (int64_t b = 0; b < codebooks; ++b) {
        std::memcpy(tile.data() + b * kRows, codes + (first + b) * rows + r,
                    static_cast<size_t>(count));
      }
      kernels.table_grad(tile.data(), kRows, static_cast<int32_t>(codebooks), shape.centroids,
                         block, static_cast<int32_t>(count), shape.outputs, target);
    }
  });
}

void cluster_sums(const Kernels& kernels, const PqShape& shape, const ConvGeometry& geometry,
                  const Quantization& quantization, const ImageView& input, const uint8_t* codes,
                  int64_t* sums, int64_t* counts, ThreadPool& pool) {
  PatchSource source(geometry, input.n, input.h, input.w);
  const size_t planes = align64(source.bytes()), scratch = source.scratch_bytes();
  AlignedBytes memory(planes + scratch * static_cast<size_t>(pool.threads()));
  source.load(input, kernels, make_grid(quantization), memory.data(), memory.data() + planes,
              scratch, pool);
  constexpr int64_t kRows = 64;
  const int64_t rows = source.rows(), depth = geometry.depth();
  const double work = static_cast<double>(rows) * shape.codebooks * shape.dim;
  pool.run(static_cast<size_t>(shape.codebooks), work / kGradPerMicrosecond,
           [&](size_t codebook, int) {
             const int64_t b = static_cast<int64_t>(codebook), from = b * shape.dim;
             const int64_t to = std::min(depth, from + shape.dim);
             int64_t* const count = counts + b * shape.centroids;
             int64_t* const sum = sums + b * shape.centroids * shape.dim;
             std::fill(count, count + shape.centroids, 0);
             std::fill(sum, sum + shape.centroids * shape.dim, 0);
             std::vector<uint8_t> patch(static_cast<size_t>(shape.dim * kRows) + kSlack);
             for (int64_t r = 0; r < rows; r += kRows) {
               const int64_t n = std::min(kRows, rows - r);
               const auto runs = source.planes().runs(r, n);
               source.planes().gather(source.data(), runs, from, to, kRows, patch.data());
               for (int64_t i = 0; i < n; ++i) {
                 const uint8_t code = codes[b * rows + r + i];
                 ++count[code];
                 for (int64_t v = 0; v < to - from; ++v)
                   sum[code * shape.dim + v] += patch[v * kRows + i];
               }
             }
           });
}

void code_pairs(const uint8_t* codes, int64_t codebooks, int64_t rows, int64_t centroids,
                int32_t* counts, ThreadPool& pool) {
  const int64_t size = codebooks * centroids;
  const double work = static_cast<double>(rows) * codebooks * (codebooks + 1) / 2;
  // Item b writes the cells of (b, a) and (a, b) for all a <= b: no two items share a cell.
  pool.run(static_cast<size_t>(codebooks), work / kPairsPerMicrosecond, [&](size_t item, int) {
    const int64_t b = static_cast<int64_t>(item);
    const uint8_t* const left = codes + b * rows;
    // Two histograms in turn, so that equal neighbours do not wait for each other's increment.
    const int64_t used = centroids * centroids;
    std::vector<int32_t> cells(static_cast<size_t>(2 * used));
    for (int64_t a = 0; a <= b; ++a) {
      const uint8_t* const right = codes + a * rows;
      int32_t* const even = cells.data();
      int32_t* const odd = even + used;
      std::fill(even, odd + used, 0);
      int64_t r = 0;
      for (; r + 2 <= rows; r += 2) {
        ++even[left[r] * centroids + right[r]];
        ++odd[left[r + 1] * centroids + right[r + 1]];
      }
      if (r < rows) ++even[left[r] * centroids + right[r]];
      for (int64_t i = 0; i < centroids; ++i) {
        for (int64_t j = 0; j < centroids; ++j) {
          const int32_t count = even[i * centroids + j] + odd[i * centroids + j];
          counts[(b * centroids + i) * size + a * centroids + j] = count;
          counts[(a * centroids + j) * size + b * centroids + i] = count;
        }
      }
    }
  });
}

}  // namespace lutra
