// The whole contract between the engine and the kernels of one instruction set.
//
// Everything is done on tiles of `row_tile` rows (a row is an output pixel of a convolution or a
// sample of a linear layer). A tile travels as planes: plane p holds one value of each row, so the
// rows are the lanes of the vector registers and the outputs come out as planes as well.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lutra {

// CPU features, with the operating system's support for the registers included.
enum Feature : uint32_t {
  kFeatureAvx2 = 1u << 0,    // AVX2, FMA
  kFeatureAvx512 = 1u << 1,  // AVX-512 F, BW, DQ, VL, VBMI, VBMI2, VNNI
};

// Sizes of one product-quantised layer.
struct PqShape {
  int32_t books;      // codebooks: sub-vectors per row
  int32_t centroids;  // K per codebook: 8, 16, 32 or 64
  int32_t dim;        // V: values per sub-vector, 1..64
  int32_t outputs;    // M
};

// What happens to the sums of a tile. Output m of row r is written to out[m * out_stride + r]:
//   y = sum * scale[m] + bias[m]   (a multiply, then an add; scale may be null: y = sum + bias)
//   y += residual[m * residual_stride + r]   if residual
//   y = min(max(y, low), high)               if clamp; max gives `low` for NaN, and 0 for -0 and 0
struct Epilogue {
  const float* scale;
  const float* bias;
  const float* residual;
  float* out;
  size_t residual_stride;
  size_t out_stride;
  int32_t rows;  // valid rows of the tile; nothing is read or written beyond
  bool clamp;
  float low;
  float high;
};

inline constexpr int32_t kMaxRowTile = 64;
inline constexpr int32_t kGemmOutputs = 4;     // outputs per block of packed convolution weights
inline constexpr int32_t kLinearOutputs = 64;  // outputs per block of packed linear weights

struct Kernels {
  const char* name;
  uint32_t needs;     // Feature bits
  int32_t row_tile;   // rows per tile, at most kMaxRowTile
  int32_t book_tile;  // codes and tables are padded to a multiple of this many codebooks

  // Canonical centroids (books, K, V) and tables (books, K, M) -> this instruction set's order.
  // Called once, when a layer is built.
  size_t (*centroid_bytes)(const PqShape&);
  void (*pack_centroids)(const PqShape&, const uint8_t* centroids, uint8_t* packed);
  size_t (*table_bytes)(const PqShape&);
  void (*pack_tables)(const PqShape&, const int8_t* tables, uint8_t* packed);

  // q[i] = clamp(round_half_even(x[i] / scale) + zero, 0, qmax); NaN becomes 0.
  void (*quantize)(const float* x, size_t n, float scale, int32_t zero, int32_t qmax, uint8_t* q);

  // Codes of codebooks first..last-1 of one tile.
  //   patch: u8 planes, (last - first) * V of row_tile bytes, 64-byte aligned
  //   codes: u8 planes, one of row_tile bytes per codebook, starting at codebook `first`
  // codes[b][r] = argmax_k(x . c_k - ((c_k . c_k) >> 1)) in int32, the lowest k on ties.
  void (*encode)(const PqShape&, const uint8_t* packed_centroids, int32_t first, int32_t last,
                 const uint8_t* patch, uint8_t* codes);

  // Codes of codebooks first..last-1 of one tile, by decision trees of s.dim levels.
  //   thresholds: (books, 64), node 0 the root, the children of i are 2 i + 1 and 2 i + 2
  //   patch: u8 planes, (last - first) * s.dim: the tap of each level
  // At every level: node = 2 * node + 1 + (tap >= threshold[node]); code = node - (K - 1).
  void (*encode_tree)(const PqShape&, const uint8_t* thresholds, int32_t first, int32_t last,
                      const uint8_t* patch, uint8_t* codes);

  // sum[m][r] = sum over b of table[b][codes[b][r]][m], exact in int32, then the epilogue.
  //   codes: planes of all codebooks (padded to book_tile with zeros); workspace: as large as codes
  void (*lookup)(const PqShape&, const uint8_t* packed_tables, const uint8_t* codes,
                 uint8_t* workspace, const Epilogue&);

  // sum[m][r] = fma chain over d, ascending, of weights[m][d] * patch[d][r], then the epilogue.
  //   patch: float planes (depth, row_tile); weights: (ceil(outputs / 4), depth, 4), zero padded
  // The order is fixed, so every instruction set gives the same bits.
  void (*gemm)(const float* patch, size_t depth, const float* weights, int32_t outputs,
               const Epilogue&);

  // y[m] = bias[m] + (fma chain over d, ascending, of weights[d][m] * x[d * x_stride]) for one row.
  //   weights: (ceil(outputs / 64), depth, 64), zero padded; y: padded to a multiple of 64
  void (*linear)(const float* x, size_t x_stride, size_t depth, const float* weights,
                 const float* bias, int32_t outputs, float* y);

  // Training. grad[b][codes[b][r]][m] += rows[r][m] for r in order: the exact gradient of tables.
  //   codes: planes `code_stride` bytes apart; rows: (count, outputs); grad: (books, K, outputs)
  void (*table_grad)(const uint8_t* codes, size_t code_stride, int32_t books, int32_t centroids,
                     const float* rows, int32_t count, int32_t outputs, float* grad);
};

extern const Kernels kScalar;  // the specification
#ifdef LUTRA_HAVE_AVX2
extern const Kernels kAvx2;
#endif
#ifdef LUTRA_HAVE_AVX512
extern const Kernels kAvx512;
#endif

}  // namespace lutra
