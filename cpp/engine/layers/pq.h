// A product-quantised convolution or linear layer, bound to one instruction set.
//
// quantised planes -> per tile of rows: encode, look up, write. A linear layer is a 1x1 convolution
// over N "images" of one pixel.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "engine/core/memory.h"
#include "engine/layers/patch_source.h"
#include "engine/layers/tile_output.h"

namespace lutra {

// What makes the codes: centroids, or splits and thresholds.
struct EncoderData {
  const uint8_t* centroids = nullptr;   // (books, K, V)
  const int32_t* splits = nullptr;      // (books, log2 K): entries of the row
  const uint8_t* thresholds = nullptr;  // (books, K - 1)
};

class PqLayer {
 public:
  // tables (books, K, M), scale (M), bias (M); all arrays are copied. shape.taps and shape.depth
  // are taken from the geometry. With `few_rows` it is also prepared for runs of a few rows.
  // Throws std::invalid_argument if the sizes do not fit each other.
  PqLayer(const Kernels& kernels, PqShape shape, const ConvGeometry& geometry,
          const Quantization& quantization, const EncoderData& encoder, const int8_t* tables,
          const float* scale, const float* bias, bool few_rows);

  struct Call {
    const ByteView* bytes = nullptr;    // the input on the layer's grid, or
    const ImageView* floats = nullptr;  // the input
    LayerOutput output;
    uint8_t* codes = nullptr;  // if not null: (books, rows) canonical codes are written here
  };

  const PqShape& shape() const { return shape_; }
  int64_t outputs() const { return shape_.outputs; }
  const ConvGeometry& geometry() const { return geometry_; }
  const Quantization& quantization() const { return quantization_; }
  // Scratch of run(). `direct`: TileOutput::direct() of the output.
  size_t workspace_bytes(int64_t n, int64_t h, int64_t w, int threads, bool direct) const;
  void run(const Call& call, uint8_t* workspace, ThreadPool& pool) const;
  void run(const ByteView& x, const LayerOutput& output, uint8_t* workspace,
           ThreadPool& pool) const {
    run({.bytes = &x, .output = output}, workspace, pool);
  }
  size_t parameter_bytes() const;
  // For outputs that are only read on this grid.
  Fold fold(Clamp clamp, const Quantization& grid) const;
  // How run() does it, for profiles.
  const char* method(int64_t rows) const;

 private:
  struct Sizes;
  bool by_row(int64_t rows) const { return few_rows_ && rows <= kFewRows; }
  const uint8_t* tables() const { return tables(canonical_.data()); }
  const uint8_t* tables(const int8_t* canonical) const;
  void run_tiles(const Call& call, const PatchSource& source, const Sizes& s, uint8_t* codes,
                 uint8_t* workers, ThreadPool& pool) const;
  void run_rows(const Call& call, const PatchSource& source, const Sizes& s, uint8_t* codes,
                uint8_t* workers, ThreadPool& pool) const;

  static constexpr int64_t kFewRows = 4;  // a tile costs as much as about seven rows

  const Kernels& kernels_;
  PqShape shape_;
  ConvGeometry geometry_;
  Quantization quantization_;
  Grid grid_;
  bool few_rows_;
  AlignedBytes encoder_;
  std::vector<int8_t> canonical_;  // tables, for single rows and until the others are packed
  struct Packed {
    std::once_flag once;
    AlignedBytes tables;
  };
  std::unique_ptr<Packed> packed_;
  std::vector<float> scale_, bias_;
};

}  // namespace lutra
