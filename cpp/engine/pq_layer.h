// A product-quantised convolution or linear layer, bound to one instruction set.
//
// quantise (once, into padded planes) -> per tile of rows: gather, encode, look up, write.
// A linear layer is a 1x1 convolution over N "images" of one pixel.
#pragma once

#include <cstdint>
#include <vector>

#include "../kernels/kernels.h"
#include "patches.h"
#include "thread_pool.h"

namespace lutra {

struct Quantization {
  float scale = 1.0f;
  int32_t zero = 0;
  int32_t bits = 7;
  int32_t qmax() const { return (1 << bits) - 1; }
};

struct Clamp {
  bool on = false;
  float low = 0.0f, high = 0.0f;
  float operator()(float v) const {  // as the kernels do: NaN and -0 become `low`
    if (!on) return v;
    v = v > low ? v : low;
    return v < high ? v : high;
  }
};

// 64-byte aligned bytes. Moved but never copied: a copy would begin at another offset.
class AlignedBytes {
 public:
  AlignedBytes() = default;
  AlignedBytes(AlignedBytes&&) = default;
  AlignedBytes& operator=(AlignedBytes&&) = default;
  explicit AlignedBytes(size_t size) : storage_(size + 64) {}
  uint8_t* data() {
    const uintptr_t p = reinterpret_cast<uintptr_t>(storage_.data());
    return storage_.data() + ((64 - p % 64) % 64);
  }
  const uint8_t* data() const { return const_cast<AlignedBytes*>(this)->data(); }

 private:
  std::vector<uint8_t> storage_;
};

class PqLayer {
 public:
  // centroids (books, K, V), tables (books, K, M), scale (M), bias (M); all are copied.
  // Throws std::invalid_argument if the sizes do not fit each other.
  PqLayer(const Kernels& kernels, const PqShape& shape, const ConvGeometry& geometry,
          const Quantization& quantization, const uint8_t* centroids, const int8_t* tables,
          const float* scale, const float* bias);
  // The same with trees: splits (books, levels), thresholds (books, K - 1); shape.dim = levels.
  PqLayer(const Kernels& kernels, const PqShape& shape, const ConvGeometry& geometry,
          const Quantization& quantization, const int32_t* splits, const uint8_t* thresholds,
          const int8_t* tables, const float* scale, const float* bias);

  struct Call {
    ImageView input;
    ImageView output;       // sizes are those of the output
    const float* residual;  // laid out like the output, or null
    Clamp clamp;
    uint8_t* codes = nullptr;  // if not null: (books, rows) canonical codes are written here
  };

  const PqShape& shape() const { return shape_; }
  const ConvGeometry& geometry() const { return geometry_; }
  size_t workspace_bytes(int64_t n, int64_t h, int64_t w, int threads) const;
  void run(const Call& call, uint8_t* workspace, ThreadPool& pool) const;

 private:
  struct Sizes {
    size_t planes, patch, codes, tile, worker;  // bytes; tile: float outputs of one tile
  };
  Sizes sizes(const PaddedPlanes<uint8_t>& planes, int64_t w) const;

  const Kernels& kernels_;
  PqShape shape_;
  ConvGeometry geometry_;
  Quantization quantization_;
  int32_t books_per_patch_;
  AlignedBytes centroids_, tables_;
  std::vector<float> scale_, bias_;
  std::vector<int32_t> splits_;  // (books, levels); empty for centroids
};

// Gradient of the tables: grad (books, K, M) = scatter-add of the output gradient by code.
//   codes (books, rows); gradient: view of shape (n, M, h, w) with rows in (n, h, w) order.
// The work is split over codebooks, so the result does not depend on the number of threads.
void table_gradient(const Kernels& kernels, const PqShape& shape, const uint8_t* codes,
                    const ImageView& gradient, float* grad, ThreadPool& pool);

// Sums and counts of the quantised sub-vectors by code: sums (books, K, V) of x_q, counts (books,
// K).
void cluster_sums(const Kernels& kernels, const PqShape& shape, const ConvGeometry& geometry,
                  const Quantization& quantization, const ImageView& input, const uint8_t* codes,
                  int64_t* sums, int64_t* counts, ThreadPool& pool);

}  // namespace lutra
