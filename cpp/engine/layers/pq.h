// A product-quantised convolution or linear layer, bound to one instruction set.
//
// quantised planes -> per tile of rows: encode, look up, write. A linear layer is a 1x1 convolution
// over N "images" of one pixel.
#pragma once

#include <mutex>
#include <vector>

#include "engine/core/memory.h"
#include "engine/layers/layer.h"
#include "engine/layers/patch_source.h"

namespace lutra {

// What makes the codes: centroids, or splits and thresholds.
struct EncoderData {
  const uint8_t* centroids = nullptr;   // (books, K, V)
  const int32_t* splits = nullptr;      // (books, log2 K): entries of the row
  const uint8_t* thresholds = nullptr;  // (books, K - 1)
};

class PqLayer : public Layer {
 public:
  // tables (books, K, M), scale (M), bias (M); all arrays are copied. shape.taps and shape.depth
  // are taken from the geometry. With `few_rows` it can run a few rows without packed tables.
  // Throws std::invalid_argument if the sizes do not fit each other.
  PqLayer(const Kernels& kernels, PqShape shape, const ConvGeometry& geometry,
          const Quantization& quantization, const EncoderData& encoder, const int8_t* tables,
          const float* scale, const float* bias, bool few_rows);

  const ConvGeometry& geometry() const override { return geometry_; }
  const Quantization& quantization() const override { return quantization_; }
  int64_t outputs() const override { return shape_.outputs; }
  void prepare(int64_t rows) const override;
  size_t workspace_bytes(int64_t n, int64_t h, int64_t w, int threads, bool direct) const override;
  void run(const ByteView& x, const LayerOutput& output, uint8_t* workspace,
           ThreadPool& pool) const override;
  // Codes: canonical ones, (books, rows).
  void run(const ImageView& x, const LayerOutput& output, uint8_t* codes, uint8_t* workspace,
           ThreadPool& pool) const override;
  void check_codes(const ImageView& x, int64_t rows, const Codes& codes) const override;
  Fold fold(Clamp clamp, const Quantization& grid) const override;
  std::string method(int64_t rows) const override;
  size_t parameter_bytes() const override;

 private:
  struct Sizes;
  struct Call;
  bool by_row(int64_t rows) const { return few_rows_ && rows <= kFewRows; }
  void pack(const int8_t* tables) const;
  template <class Load>
  void run_loaded(PatchSource& source, const Call& call, uint8_t* workspace, ThreadPool& pool,
                  const Load& load) const;
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
  std::vector<int8_t> canonical_;  // tables, for few rows and until the others are packed
  mutable std::once_flag packing_;
  mutable AlignedBytes packed_;  // tables
  std::vector<float> scale_, bias_;
};

}  // namespace lutra
