// The whole contract between the engine and the kernels of one instruction set.
//
// Everything is done on tiles of at most `row_tile` rows (a row is an output pixel of a convolution
// or a sample of a linear layer). Rows are the lanes of the vector registers, and outputs come out
// as planes: one value of each row. Buffers that only kernels read (codes, packed tables, gathered
// values) have whatever order suits the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lutra {

// CPU features, with the operating system's support for the registers included.
enum Feature : uint32_t {
  kFeatureAvx2 = 1u << 0,     // AVX2, FMA
  kFeatureAvx512 = 1u << 1,   // AVX-512 F, BW, DQ, VL, VBMI, VBMI2, VNNI
  kFeatureNeon = 1u << 2,     // Advanced SIMD of AArch64
  kFeatureDot = 1u << 3,      // Armv8.2 with dot products of bytes (sdot, udot)
  kFeatureWasm = 1u << 4,     // WebAssembly with SIMD of 128 bits
  kFeatureWasmDot = 1u << 5,  // and relaxed SIMD
};

inline constexpr int32_t kMaxRowTile = 64;
inline constexpr int32_t kRowBlock = 16;       // tiles of so few rows must not cost a whole tile
inline constexpr int32_t kGemmOutputs = 4;     // outputs per block of packed float weights
inline constexpr int32_t kLinearOutputs = 64;  // outputs per block of packed linear weights
inline constexpr int32_t kMaxQuantized = 2;    // quantised copies that an epilogue can write
inline constexpr int32_t kMaxDepthwiseTaps = 128;
inline constexpr int32_t kMaxConvTaps = 128;   // of conv8()
inline constexpr int32_t kConvOutputs = 16;    // conv8() may be split at multiples of this
inline constexpr size_t kSlack = 64;           // bytes that may be read after any value of a plane
inline constexpr int32_t kLowBitOutputs = 16;  // low-bit kernels may be split at multiples of this
inline constexpr int32_t kLowBitRows = 12;     // rows of a tile of lowbit_dense(), at most
inline constexpr int32_t kTableRows = 32;      // rows of a tile of lowbit_tables()
inline constexpr int32_t kRegisterRows = 4;    // rows of a tile of lowbit_registers(), at most

enum class Encoder : int32_t { kNearest, kTree };
// How far a sub-vector is from a centroid, for kNearest.
enum class Distance : int32_t { kL2, kL1, kChebyshev };

// Sizes of one product-quantised layer.
struct PqShape {
  int32_t depth;      // D: entries of a row
  int32_t taps;       // entries of a row that share a plane: kernel rows x columns; divides D
  int32_t codebooks;  // codebooks
  int32_t centroids;  // K per codebook: 8, 16, 32 or 64
  int32_t dim;        // V: entries per sub-vector, 1..64; codebook b has entries b * V .. (nearest)
  int32_t outputs;    // M
  int32_t bits;       // of the activations, 1..7
  Encoder encoder;
  int32_t parts = 1;  // T: of a row that have the same codebooks; divides `codebooks`
  Distance distance = Distance::kL2;
};

// Codes of a tile that lie in planes of units (see code_unit), where the rows of each block of
// kRowBlock are consecutive. Unit i is that of codebooks (i / T) unit .. of part i % T; for row r
// it is at
//   planes + offset[i] + block[r / kRowBlock] + r % kRowBlock * unit
// Whole blocks are read.
struct CodeTile {
  const uint8_t* planes;
  const int64_t* offset;  // (codebooks / unit), and another one, which repeats any of them
  const int32_t* block;   // of each block that has valid rows
};

// Sizes of one lookup layer, whose products are entries of one table.
struct LookupShape {
  int32_t depth;    // D: entries of a row
  int32_t taps;     // entries of a row that share a plane, as above
  int32_t outputs;  // M
  int32_t levels;   // activation indices: 4, 8, 16, 32 or 64
  int32_t weights;  // weight indices: odd, 3..33
};

// Where the activations of a tile are: an entry has an offset, a row has an offset, and their sum
// is the address. Entry d of row r is
//   planes[(d / taps) * plane + tap[d % taps] + row[r]]
struct Patch {
  const uint8_t* planes;
  int64_t plane;       // bytes from one plane (channel) to the next
  const int32_t* tap;  // (taps)
  const int32_t* row;  // (row_tile) ascending; those beyond `rows` repeat the last one
  int32_t rows;        // valid rows, 1..row_tile
  bool consecutive;    // row[r] == row[0] + r for all valid rows
};

// An activation grid: q = clamp(round_half_even(x / scale) + zero, 0, qmax); NaN becomes 0.
//
// `inverse` is float32(1 / scale) where the quotient may be taken as
//   t = x * inverse;  t = fma(fma(-t, scale, x), inverse, t)
// (the engine has checked that this rounds to the same integers), else 0: then divide.
struct Grid {
  float scale;
  float inverse;
  int32_t zero;
  int32_t qmax;
};

// What happens to the sums of a tile. Output m of row r:
//   y = sum                                     (float sum), or
//   y = float32(sum + offset[m])                (integer sum; offset may be null: none)
//   y = y * scale[m]                            if scale
//   y = y + bias[m]                             (a multiply, then an add: never contracted)
//   y = y + residual[m * residual_stride + r]   if residual
//   y = min(max(y, low), high)                  if clamp; max gives `low` for NaN, and 0 for -0, 0
//   out[m * out_stride + r] = y                 if out
//   q[i].out[m * q[i].stride + r] = grid(y)     for i < quantized
// m counts the outputs of the whole layer, also where a call makes only some of them.
//
// With fold_scale, an integer sum has no residual, one quantised output and no float output, and
//   t = fma(float32(sum + offset[m]), fold_scale[m], fold_bias[m])
// is quantised as q[0].grid quantises a quotient x / scale. The engine has checked that this gives
// the same integer as the chain above and what comes behind it. Where fold_scale[m] is NaN nothing
// comes behind it, and the chain is used.
struct Epilogue {
  const int32_t* offset;
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
  const float* fold_scale;
  const float* fold_bias;
  int32_t quantized;
  struct {
    Grid grid;
    uint8_t* out;
    size_t stride;
  } q[kMaxQuantized];
};

// A depthwise layer: every output comes from one plane. Tap t of row r of a tile is at
//   planes[(m / multiplier) * plane + offset[t] + r * step]
// for output m, or has the value `zero` where bit r of valid[t] is 0.
struct DepthwiseShape {
  int32_t taps;        // at most kMaxDepthwiseTaps
  int32_t row;         // taps that are `gap` elements apart from one to the next; divides taps
  int32_t gap;         // 0: they are anywhere
  int32_t step;        // elements from one row of a tile to the next: 1, of bytes also 2
  int32_t multiplier;  // outputs of a plane
};
template <class T>
struct DepthwiseTile {
  const T* planes;  // every address of a tile of 64 rows, and 64 elements more, may be read
  int64_t plane;
  const int32_t* offset;  // (taps)
  const uint8_t* masks;   // `valid` in this instruction set's order
  T zero;
};

// Sizes of a convolution in int8. Its planes hold quads: a pixel's four channels 4 i .. 4 i + 3 are
// neighbouring bytes of plane i. Of a last plane with fewer channels the other bytes may be
// anything.
struct Conv8Shape {
  int32_t channels;
  int32_t taps;  // at most kMaxConvTaps
  int32_t outputs;
};

// Functions of one variable, good to a few units in the last place (gelu, and erf where it is not
// small: to 1e-7), for every float: NaN gives NaN, infinities the limit. Of numbers that are too
// small for a mantissa of 24 bits, the logarithm is that of the smallest that is not.
enum class Function : int32_t {
  kGelu,      // x Phi(x)
  kGeluTanh,  // 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
  kSilu,
  kTanh,
  kSigmoid,
  kExp,
  kErf,
  kSqrt,
  kRsqrt,
  kReciprocal,
  kLog,
  kElu,       // x, or e^x - 1 below 0
  kSoftplus,  // log(1 + e^x)
  kMish,      // x tanh(softplus(x))
};

// Simple functions, of which a chain runs in one pass.
enum class BendKind : int32_t {
  kLine,       // x a + b, a multiply and then an add
  kLimits,     // y = x > a ? x : a;  y < b ? y : b
  kHardswish,  // x min(max(x + 3, 0), 6) / 6, from left to right
  kLeaky,      // x > 0 ? x : x a
};
struct Bend {
  BendKind kind;
  float a, b;
};

// A piecewise-linear function of 8, 16 or 32 entries:
//   i = how many breakpoints are <= x (0 for NaN);  y = fma(slope[i], x, intercept[i])
// where the slope of an outer entry is 0, an infinite x on its side counts as the largest float.
struct Piecewise {
  int32_t entries;
  const float* breakpoint;  // (entries - 1) ascending
  const float* slope;       // (entries)
  const float* intercept;   // (entries)
};

// A table of 8, 16 or 32 = E lines that the bits of a float index, after a reduction of the range;
// without entries: the function itself.
//   exp:        t = x log2(e), n = floor(t), i = floor(t E) mod E
//               y = fma(slope[i], t - n, intercept[i]) 2^n;  x < -87 gives 0; x > 88 counts as 88
//   reciprocal: x = m 2^n, 1 <= m < 2, i = the first log2(E) bits of m's fraction
//               y = fma(slope[i], m, intercept[i]) 2^-n, with the sign of x; +-inf gives +-0, zeros
//               and denormal numbers about +-2^127
//   rsqrt:      x = m 4^n, 1 <= m < 4, i = (m >= 2) E / 2 + the first log2(E) - 1 bits of the
//               mantissa;  y = fma(slope[i], m, intercept[i]) 2^-n; zeros and denormal numbers give
//               about 2^64, +inf counts as the largest float, numbers below 0 give NaN
// NaN gives NaN.
struct Segments {
  int32_t entries;
  const float* slope;
  const float* intercept;
};

// Results that are planes: value r of plane m goes to out[m * stride + r], if out, and onto grids.
struct PlaneOutput {
  float* out;
  size_t stride;
  int32_t quantized;
  struct {
    Grid grid;
    uint8_t* out;
    size_t stride;
  } q[kMaxQuantized];
};

// Normalises rows of `width` features, each of which is a plane. "Sum" is
//   (s0 + s1) + (s2 + s3),  sk = the sum of entries k, k + 4, k + 8, ... in order
// mean = sum of x[d] / width, or 0 without `center`;  c[d] = x[d] - mean
// power = (sum of c[d] c[d], contracted) / width + eps;  r = 1 / sqrt(power), or of the table
// y[d] = fma(c[d] r, weight[d], bias[d]), where no bias is a bias of 0
struct Norm {
  int32_t width;
  bool center;
  float eps;
  const float* weight;
  const float* bias;
  Segments rsqrt;
};

// For each row: top = max x[j], p[j] = exp(x[j] - top), 0 below -87; s = the sum of p[j] in order;
// y[j] = p[j] (1 / s). The exponential and the reciprocal may be tables.
struct Softmax {
  int32_t count;
  Segments exp, reciprocal;
};

// Attention of one head in one sample. Planes of q, k and v are features; the key j may be attended
// by the query i if mask[j] != 0 (or there is no mask) and, when causal, j <= i. Over these j, in
// order:
//   x[j] = fma chain over d of (q[d][i] scale) k[d][j];  p[j], s as in Softmax
//   y[d][i] = (fma chain over j of p[j] v[d][j]) (1 / s);  0 where s <= 0, as without any such j
// A key that some queries of a call may attend and others may not must have finite v.
struct Attention {
  int32_t width;  // d
  int32_t keys;
  bool causal;
  int32_t past;  // keys before the first query: a causal one sees keys 0..past + its index
  float scale;
  const float* q;  // at the first token of the sample, as k and v
  const float* k;
  const float* v;
  size_t q_stride, k_stride, v_stride;  // from one plane to the next
  size_t v_step;                        // from one key to the next in v
  const int32_t* mask;                  // (keys), or null
  Segments exp, reciprocal;
};

// Sizes of a matrix of low-bit weights. A weight is a code u of 0..levels - 1.
struct LowBitShape {
  int32_t depth;    // K
  int32_t outputs;  // M
  int32_t levels;   // 2, 3, 4, 8 or 16
  int32_t group;    // neighbouring weights of an output that share a scale; divides K
};

// What the sums of a group of weights become. For row r and output m, X[r] being the sum of the
// activations of the group:
//   d = times * sum[r][m] + (plus - zero[m]) * X[r]   in int32; without `zero`, zero[m] is 0
//   y = float32(d) * scale[m]
//   y = out[r][m] + y                                 unless `first`; never contracted
//   y = y * row_scale[r]                              if row_scale
//   out[r][m] = y
struct LowBitFinish {
  int32_t times, plus;
  const int32_t* zero;   // (outputs), or null
  const float* scale;    // (outputs)
  const int32_t* x_sum;  // (rows)
  bool first;
  const float* row_scale;  // (rows), or null
};

struct Kernels {
  const char* name;
  uint32_t needs;         // Feature bits
  int32_t row_tile;       // rows per tile, at most kMaxRowTile
  int32_t codebook_tile;  // encode() may be split between codebooks at multiples of this
  int32_t output_tile;    // lookup(), dense8() and respond() may be split at multiples of this

  // q[i] = grid(x[i])
  void (*quantize)(const float* x, size_t n, const Grid& grid, uint8_t* q);

  // --- product quantisation ---------------------------------------------------------------------
  // Canonical centroids (codebooks, K, V), or splits (codebooks, log2 K) and thresholds (codebooks,
  // K - 1), and tables (codebooks, K, M) -> this instruction set's order. Called once, when a layer
  // is built.
  size_t (*encoder_bytes)(const PqShape&);
  void (*pack_nearest)(const PqShape&, const uint8_t* centroids, uint8_t* packed);
  void (*pack_tree)(const PqShape&, const int32_t* splits, const uint8_t* thresholds,
                    uint8_t* packed);
  size_t (*table_bytes)(const PqShape&);
  void (*pack_tables)(const PqShape&, const int8_t* tables, uint8_t* packed);

  // Codes of codebooks first..last-1 of one tile, by the encoder of the shape:
  //   nearest: the lowest k on ties; x is the sub-vector, whose entries beyond D count as 0
  //     kL2: argmax_k(x . c_k - ((c_k . c_k) >> 1)) in int32
  //     kL1: argmin_k(sum_v |x_v - c_kv|)
  //     kChebyshev: argmin_k(max_v |x_v - c_kv|)
  //   tree: node = 0; for each level l: node = 2 node + 1 + (x[split[l]] >= threshold[node]);
  //     the code is node - (K - 1)
  // `codes` has code_bytes(shape) bytes, is 64-byte aligned and belongs to the whole tile. Nothing
  // need be initialised; what encode() does not write for its own codebooks it does not touch.
  size_t (*code_bytes)(const PqShape&);
  void (*encode)(const PqShape&, const uint8_t* packed, const Patch&, int32_t first, int32_t last,
                 uint8_t* codes);
  // out[b * stride + r] = code of codebook b and row r, for r < rows (those given to encode())
  void (*unpack_codes)(const PqShape&, const uint8_t* codes, int32_t rows, uint8_t* out,
                       size_t stride);

  // Planes of codes that are made before: of a layer whose rows have several parts, codebook
  // g T + t being codebook g of part t. A unit is the codes of `unit` neighbouring codebooks of a
  // part, as many bytes, and lies in a plane of its own for every `unit` codebooks.
  int32_t (*code_unit)(const PqShape&);  // 1, or a divisor of codebooks / T
  // unit r of plane i is at out + i * stride + r * unit, for r < rows. The codes and the shape are
  // those of the part. Only where the unit is not 1: else unpack_codes() makes the planes.
  void (*unpack_units)(const PqShape& part, const uint8_t* codes, int32_t rows, uint8_t* out,
                       size_t stride);
  // Codes of codebooks first..last-1 of one tile, in this instruction set's order, as lookup()
  // takes them: the patch has T units of a row to a plane.
  void (*gather_codes)(const PqShape&, const Patch&, int32_t first, int32_t last, uint8_t* codes);

  // sum[m][r] = sum over b of table[b][code[b][r]][m], exact in int32, then the epilogue, for
  // outputs first..last-1. Epilogue::rows is Patch::rows of encode().
  void (*lookup)(const PqShape&, const uint8_t* tables, const uint8_t* codes, int32_t first,
                 int32_t last, const Epilogue&);

  // The same, of codes that are read where they are. May be null, or refuse a shape: then
  // gather_codes() and lookup().
  bool (*reads_units)(const PqShape&);
  void (*lookup_units)(const PqShape&, const uint8_t* tables, const CodeTile&, int32_t first,
                       int32_t last, const Epilogue&);

  // One row, without tiles: sums[m - first] = sum over b of tables[b][codes[b]][m] for outputs
  // first..last-1. Here the tables are canonical, (codebooks, K, M), and so are the codes,
  // (codebooks).
  void (*lookup_row)(const PqShape&, const int8_t* tables, const uint8_t* codes, int32_t first,
                     int32_t last, int32_t* sums);

  // --- dense layers in int8: u8 activations of at most 7 bits, s8 weights in -127..127 -----------
  // weights (outputs, depth) -> this instruction set's order
  size_t (*dense8_bytes)(int32_t depth, int32_t outputs);
  void (*pack_dense8)(int32_t depth, int32_t outputs, const int8_t* weights, uint8_t* packed);
  // The entries 0..depth-1 of a tile, `taps` of them to a plane, ready for dense8().
  size_t (*gather8_bytes)(int32_t depth);
  void (*gather8)(int32_t depth, int32_t taps, const Patch&, uint8_t* gathered);
  // sum[m][r] = sum over d of weights[m][d] * x[d][r], exact in int32, then the epilogue, for
  // outputs first..last-1
  void (*dense8)(int32_t depth, int32_t outputs, const uint8_t* packed, const uint8_t* gathered,
                 int32_t first, int32_t last, const Epilogue&);
  // One row: sums[m - first] for outputs first..last-1 of x (depth, padded with zeros to a multiple
  // of 64 bytes).
  void (*dense8_row)(int32_t depth, int32_t outputs, const uint8_t* packed, const uint8_t* x,
                     int32_t first, int32_t last, int32_t* sums);

  // --- convolutions in int8, of the same numbers, that read quads where they are ----------------
  // All five may be null: then the layer gathers its activations and takes dense8().
  // weights (outputs, channels, taps) -> this instruction set's order
  size_t (*conv8_bytes)(const Conv8Shape&);
  void (*pack_conv8)(const Conv8Shape&, const int8_t* weights, uint8_t* packed);
  // Patches: the planes are those of quads, taps and rows are in bytes. What of a tile conv8()
  // cannot read in place is copied before; `copies` is 64-byte aligned.
  size_t (*conv8_copy_bytes)(const Conv8Shape&);
  void (*copy_conv8)(const Conv8Shape&, const Patch&, uint8_t* copies);
  // sum[m][r] = sum over c, t of weights[m][c][t] * x[c][t][r], exact in int32, then the epilogue,
  // for outputs first..last-1, where `first` is a multiple of kConvOutputs
  void (*conv8)(const Conv8Shape&, const uint8_t* packed, const Patch&, uint8_t* copies,
                int32_t first, int32_t last, const Epilogue&);

  // --- depthwise layers -------------------------------------------------------------------------
  // In int8: weights (outputs, taps) -> this instruction set's order
  size_t (*depthwise8_bytes)(const DepthwiseShape&, int32_t outputs);
  void (*pack_depthwise8)(const DepthwiseShape&, int32_t outputs, const int8_t* weights,
                          uint8_t* packed);
  // valid (taps): bit r for row r -> this instruction set's order, 64-byte aligned
  size_t (*depthwise8_mask_bytes)(const DepthwiseShape&);
  void (*pack_depthwise8_masks)(const DepthwiseShape&, const uint64_t* valid, uint8_t* packed);
  // sum[m][r] = sum over t of weights[m][t] * x[t][r], exact in int32, then the epilogue, for
  // outputs first..last-1
  void (*depthwise8)(const DepthwiseShape&, const uint8_t* packed, const DepthwiseTile<uint8_t>&,
                     int32_t first, int32_t last, const Epilogue&);
  // In float32: masks are `valid` itself; `zero` is 0, the step 1.
  // sum[m][r] = fma chain over t, ascending, of weights[m][t] * x[t][r], then the epilogue
  void (*depthwise)(const DepthwiseShape&, const float* weights, const DepthwiseTile<float>&,
                    int32_t first, int32_t last, const Epilogue&);

  // --- lookup layers: entries of one table instead of products ----------------------------------
  // Entries -127..127 of the table (levels, weights) and weight indices (outputs, depth), one byte
  // each -> this instruction set's order
  size_t (*response_bytes)(const LookupShape&);
  void (*pack_responses)(const LookupShape&, const int8_t* table, const uint8_t* weight,
                         uint8_t* packed);
  // The activation indices of a tile, ready for respond().
  size_t (*index_bytes)(const LookupShape&);
  void (*gather_indices)(const LookupShape&, const Patch&, uint8_t* gathered);
  // sum[m][r] = sum over d of table[x[d][r]][weight[m][d]], exact in int32, then the epilogue, for
  // outputs first..last-1
  void (*respond)(const LookupShape&, const uint8_t* packed, const uint8_t* gathered, int32_t first,
                  int32_t last, const Epilogue&);
  // One row, only for taps == 1: sums[m - first] for outputs first..last-1 of x (depth).
  void (*respond_row)(const LookupShape&, const uint8_t* packed, const uint8_t* x, int32_t first,
                      int32_t last, int32_t* sums);

  // --- low-bit weights: codes u of 1 to 4 bits, activations in int8 ------------------------------
  // q = round_half_even(x * (127 / a)) with a = max |x|; gives a / 127. Where a < 2^-120: zeros, 0.
  // Where an x is not finite: zeros, NaN.
  float (*lowbit_quantize)(const float* x, size_t n, int8_t* q);

  // Codes (outputs, depth) -> this instruction set's order, for each of the three kernels.
  size_t (*lowbit_dense_bytes)(const LowBitShape&);
  void (*pack_lowbit_dense)(const LowBitShape&, const uint8_t* codes, uint8_t* packed);
  size_t (*lowbit_table_bytes)(const LowBitShape&);
  void (*pack_lowbit_tables)(const LowBitShape&, const uint8_t* codes, uint8_t* packed);
  size_t (*lowbit_register_bytes)(const LowBitShape&);
  void (*pack_lowbit_registers)(const LowBitShape&, const uint8_t* codes, uint8_t* packed);

  // All give sums of one group of weights, exact in int32, for outputs first..last-1, where
  // `first` is a multiple of kLowBitOutputs:
  //   sums[r * stride + m - first] = sum over k of (u[m][k] - z) * x[k][r], r < rows
  // with z = 0, but z = levels / 2 (1 for three levels) for lowbit_tables().
  //
  // x: (ceil(group / 32) 8, width, 4), four neighbouring k of a row together, zero padded; width is
  // 1, 2, 4, 8 or 12 and at least `rows`.
  void (*lowbit_dense)(const LowBitShape&, const uint8_t* packed, int32_t group, const int8_t* x,
                       int32_t width, int32_t rows, int32_t first, int32_t last, int32_t* sums,
                       size_t stride);
  // x: (lowbit_table_depth(), kTableRows), zero padded. `scratch` is 64-byte aligned.
  int32_t (*lowbit_table_depth)(const LowBitShape&);
  size_t (*lowbit_scratch_bytes)(const LowBitShape&, int32_t outputs);  // of a call
  void (*lowbit_tables)(const LowBitShape&, const uint8_t* packed, int32_t group, const int8_t* x,
                        int32_t rows, int32_t first, int32_t last, int32_t* sums, size_t stride,
                        uint8_t* scratch);
  // x: (rows, ceil(group / 32) 32), zero padded; at most kRegisterRows rows. `scratch` is 64-byte
  // aligned.
  size_t (*lowbit_register_scratch_bytes)(const LowBitShape&, int32_t rows);
  void (*lowbit_registers)(const LowBitShape&, const uint8_t* packed, int32_t group,
                           const int8_t* x, int32_t rows, int32_t first, int32_t last,
                           int32_t* sums, size_t stride, uint8_t* scratch);
  // `sums` and `out` are (rows, outputs) with strides of their own.
  void (*lowbit_finish)(const LowBitFinish&, int32_t rows, int32_t outputs, const int32_t* sums,
                        size_t sums_stride, float* out, size_t out_stride);

  // --- dense layers in float32 ------------------------------------------------------------------
  // sum[m][r] = fma chain over d, ascending, of weights[m][d] * patch[d][r], then the epilogue.
  //   patch: float planes (depth, row_tile); weights: (ceil(outputs / 4), depth, 4), zero padded
  // The order is fixed, so every instruction set gives the same bits.
  void (*gemm)(const float* patch, size_t depth, const float* weights, int32_t outputs,
               const Epilogue&);

  // y[m] = bias[m] + (fma chain over d, ascending, of weights[d][m] * x[d * x_stride]) for one row.
  //   weights: (ceil(outputs / 64), depth, 64), zero padded; y: padded to a multiple of 64
  void (*linear)(const float* x, size_t x_stride, size_t depth, const float* weights,
                 const float* bias, int32_t outputs, float* y);

  // --- functions, from floats to floats; y may be x ---------------------------------------------
  void (*function)(Function, const float* x, size_t n, float* y);
  // bends[0], then bends[1], ...
  void (*bend)(const Bend* bends, int32_t count, const float* x, size_t n, float* y);
  void (*piecewise)(const Piecewise&, const float* x, size_t n, float* y);
  void (*table_exp)(const Segments&, const float* x, size_t n, float* y);
  void (*table_reciprocal)(const Segments&, const float* x, size_t n, float* y);
  void (*table_rsqrt)(const Segments&, const float* x, size_t n, float* y);

  // --- rows that lie across planes: `stride` floats from one plane to the next
  // --------------------
  void (*norm)(const Norm&, const float* x, size_t stride, size_t rows, const PlaneOutput&);
  void (*softmax)(const Softmax&, const float* x, size_t stride, size_t rows, float* y);
  // Queries first..last-1; plane m of the output is feature m, its value r query r.
  size_t (*attention_bytes)(int32_t width, int32_t keys);  // of scratch, 64-byte aligned
  void (*attention)(const Attention&, int32_t first, int32_t last, const PlaneOutput&,
                    uint8_t* scratch);
  // One query with the same bits, without a mask, for v_stride == 1: values in rows.
  size_t (*attention_row_bytes)(int32_t width, int32_t keys);
  void (*attention_row)(const Attention&, int32_t query, const PlaneOutput&, uint8_t* scratch);

  // --- training ---------------------------------------------------------------------------------
  // grad[b][codes[b][r]][m] += rows[r][m] for r in order: the exact gradient of tables.
  //   codes: planes `code_stride` bytes apart; rows: (count, outputs); grad: (codebooks, K,
  //   outputs)
  void (*table_grad)(const uint8_t* codes, size_t code_stride, int32_t codebooks, int32_t centroids,
                     const float* rows, int32_t count, int32_t outputs, float* grad);

  // For each of n elements with gradient g and activation index k < levels: cells[k] += g,
  // counts[k] += 1; where low < x < high, inside += g * x, elsewhere the gradient becomes zero.
  // What has a larger index is not counted. The order of the sums is that of the instruction set.
  void (*response_grad)(const float* x, const uint8_t* index, float* gradient, size_t n, float low,
                        float high, int32_t levels, double* cells, int64_t* counts, double* inside);
};

extern const Kernels kScalar;  // the specification
#ifdef LUTRA_HAVE_AVX2
extern const Kernels kAvx2;
#endif
#ifdef LUTRA_HAVE_AVX512
extern const Kernels kAvx512;
#endif
#ifdef LUTRA_HAVE_NEON
extern const Kernels kNeon;
#endif
#ifdef LUTRA_HAVE_NEON_DOT
extern const Kernels kNeonDot;
#endif
#ifdef LUTRA_HAVE_WASM_DOT
extern const Kernels kWasmDot;
#endif
#ifdef LUTRA_HAVE_WASM
extern const Kernels kWasm;
#endif

}  // namespace lutra
