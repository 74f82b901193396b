// The specification: every other instruction set must give the same bits.
#include <cmath>

#include "kernels.h"
#include "scalar_lanes.h"
#include "scalar_lowbit.h"
#include "scalar_training.h"
// After the lanes that they are written in:
#include "functions.h"
#include "scalar_planes.h"

namespace lutra {
namespace {

constexpr int32_t kRows = 16;

uint8_t quotient_to_grid(float t, const Grid& g) {
  const float low = static_cast<float>(-g.zero), high = static_cast<float>(g.qmax - g.zero);
  t = t > low ? t : low;  // NaN becomes low
  t = t < high ? t : high;
  return static_cast<uint8_t>(static_cast<int32_t>(std::nearbyintf(t)) + g.zero);
}

uint8_t to_grid(float x, const Grid& g) { return quotient_to_grid(x / g.scale, g); }

void quantize(const float* x, size_t n, const Grid& grid, uint8_t* q) {
  for (size_t i = 0; i < n; ++i) q[i] = to_grid(x[i], grid);
}

void finish(float y, const Epilogue& e, int32_t m, int32_t r) {
  if (e.scale) y = y * e.scale[m];
  y = y + e.bias[m];
  if (e.residual) y += e.residual[m * e.residual_stride + r];
  if (e.clamp) {
    y = y > e.low ? y : e.low;
    y = y < e.high ? y : e.high;
  }
  if (e.out) e.out[m * e.out_stride + r] = y;
  for (int32_t i = 0; i < e.quantized; ++i) {
    e.q[i].out[m * e.q[i].stride + r] = to_grid(y, e.q[i].grid);
  }
}

void finish(int32_t sum, const Epilogue& e, int32_t m, int32_t r) {
  if (e.offset) sum += e.offset[m];
  if (e.fold_scale && !std::isnan(e.fold_scale[m])) {
    const float t = fmaf(static_cast<float>(sum), e.fold_scale[m], e.fold_bias[m]);
    e.q[0].out[m * e.q[0].stride + r] = quotient_to_grid(t, e.q[0].grid);
    return;
  }
  finish(static_cast<float>(sum), e, m, r);
}

int32_t entry(const Patch& p, int32_t taps, int32_t d, int32_t r) {
  return p.planes[(d / taps) * p.plane + p.tap[d % taps] + p.row[r]];
}

int32_t levels(const PqShape& s) {
  int32_t n = 0;
  while ((1 << n) < s.centroids) ++n;
  return n;
}

// Packed encoders are the canonical arrays; a tree's splits are followed by its thresholds.
size_t encoder_bytes(const PqShape& s) {
  if (s.encoder == Encoder::kNearest) {
    return static_cast<size_t>(s.codebooks) * s.centroids * s.dim;
  }
  return static_cast<size_t>(s.codebooks) * (levels(s) * sizeof(int32_t) + s.centroids - 1);
}

void pack_nearest(const PqShape& s, const uint8_t* centroids, uint8_t* packed) {
  for (size_t i = 0; i < encoder_bytes(s); ++i) packed[i] = centroids[i];
}

void pack_tree(const PqShape& s, const int32_t* splits, const uint8_t* thresholds,
               uint8_t* packed) {
  const size_t count = static_cast<size_t>(s.codebooks) * levels(s);
  int32_t* const to = reinterpret_cast<int32_t*>(packed);
  for (size_t i = 0; i < count; ++i) to[i] = splits[i];
  uint8_t* const rest = reinterpret_cast<uint8_t*>(to + count);
  for (size_t i = 0; i < static_cast<size_t>(s.codebooks) * (s.centroids - 1); ++i) {
    rest[i] = thresholds[i];
  }
}

size_t table_bytes(const PqShape& s) {
  return static_cast<size_t>(s.codebooks) * s.centroids * s.outputs;
}

void pack_tables(const PqShape& s, const int8_t* tables, uint8_t* packed) {
  for (size_t i = 0; i < table_bytes(s); ++i) packed[i] = static_cast<uint8_t>(tables[i]);
}

size_t code_bytes(const PqShape& s) { return static_cast<size_t>(s.codebooks) * kRows; }

// The larger, the nearer.
template <Distance kDistance>
int32_t score_of(const PqShape& s, const uint8_t* centroid, const Patch& p, int32_t b, int32_t r) {
  int32_t score = 0, norm = 0;
  for (int32_t v = 0; v < s.dim; ++v) {
    const int32_t d = b * s.dim + v, c = centroid[v];
    const int32_t x = d < s.depth ? entry(p, s.taps, d, r) : 0;
    if constexpr (kDistance == Distance::kL2) {
      score += c * x;
      norm += c * c;
    } else {
      const int32_t apart = x < c ? x - c : c - x;  // below zero
      if constexpr (kDistance == Distance::kL1) score += apart;
      if constexpr (kDistance == Distance::kChebyshev) score = apart < score ? apart : score;
    }
  }
  return score - (norm >> 1);
}

template <Distance kDistance>
int32_t nearest(const PqShape& s, const uint8_t* centroids, const Patch& p, int32_t b, int32_t r) {
  const uint8_t* const codebook = centroids + static_cast<size_t>(b) * s.centroids * s.dim;
  int32_t best = INT32_MIN, code = 0;
  for (int32_t k = 0; k < s.centroids; ++k) {
    const int32_t score = score_of<kDistance>(s, codebook + k * s.dim, p, b, r);
    if (score > best) {
      best = score;
      code = k;
    }
  }
  return code;
}

int32_t descend(const PqShape& s, const uint8_t* packed, const Patch& p, int32_t b, int32_t r) {
  const int32_t depth = levels(s);
  const int32_t* const splits = reinterpret_cast<const int32_t*>(packed);
  const uint8_t* const thresholds =
      reinterpret_cast<const uint8_t*>(splits + static_cast<size_t>(s.codebooks) * depth) +
      static_cast<size_t>(b) * (s.centroids - 1);
  int32_t node = 0;
  for (int32_t l = 0; l < depth; ++l) {
    const int32_t x = entry(p, s.taps, splits[b * depth + l], r);
    node = 2 * node + 1 + (x >= thresholds[node] ? 1 : 0);
  }
  return node - (s.centroids - 1);
}

void encode(const PqShape& s, const uint8_t* packed, const Patch& p, int32_t first, int32_t last,
            uint8_t* codes) {
  auto* const find = s.encoder == Encoder::kTree   ? descend
                     : s.distance == Distance::kL2 ? nearest<Distance::kL2>
                     : s.distance == Distance::kL1 ? nearest<Distance::kL1>
                                                   : nearest<Distance::kChebyshev>;
  for (int32_t b = first; b < last; ++b) {
    for (int32_t r = 0; r < p.rows; ++r) {
      codes[b * kRows + r] = static_cast<uint8_t>(find(s, packed, p, b, r));
    }
  }
}

void unpack_codes(const PqShape& s, const uint8_t* codes, int32_t rows, uint8_t* out,
                  size_t stride) {
  for (int32_t b = 0; b < s.codebooks; ++b) {
    for (int32_t r = 0; r < rows; ++r) out[b * stride + r] = codes[b * kRows + r];
  }
}

int32_t code_unit(const PqShape&) { return 1; }

void unpack_units(const PqShape& s, const uint8_t* codes, int32_t rows, uint8_t* out,
                  size_t stride) {
  unpack_codes(s, codes, rows, out, stride);
}

void gather_codes(const PqShape& s, const Patch& p, int32_t first, int32_t last, uint8_t* codes) {
  for (int32_t b = first; b < last; ++b) {
    for (int32_t r = 0; r < p.rows; ++r) {
      codes[b * kRows + r] = static_cast<uint8_t>(entry(p, s.parts, b, r));
    }
  }
}

void lookup(const PqShape& s, const uint8_t* tables, const uint8_t* codes, int32_t first,
            int32_t last, const Epilogue& e) {
  for (int32_t m = first; m < last; ++m) {
    for (int32_t r = 0; r < e.rows; ++r) {
      int32_t sum = 0;
      for (int32_t b = 0; b < s.codebooks; ++b) {
        const size_t row = static_cast<size_t>(b) * s.centroids + codes[b * kRows + r];
        sum += static_cast<int8_t>(tables[row * s.outputs + m]);
      }
      finish(sum, e, m, r);
    }
  }
}

bool reads_units(const PqShape&) { return true; }

void lookup_units(const PqShape& s, const uint8_t* tables, const CodeTile& tile, int32_t first,
                  int32_t last, const Epilogue& e) {
  for (int32_t m = first; m < last; ++m) {
    for (int32_t r = 0; r < e.rows; ++r) {
      int32_t sum = 0;
      for (int32_t b = 0; b < s.codebooks; ++b) {
        const uint8_t code =
            tile.planes[tile.offset[b] + tile.block[r / kRowBlock] + r % kRowBlock];
        const size_t row = static_cast<size_t>(b) * s.centroids + code;
        sum += static_cast<int8_t>(tables[row * s.outputs + m]);
      }
      finish(sum, e, m, r);
    }
  }
}

void lookup_row(const PqShape& s, const int8_t* tables, const uint8_t* codes, int32_t first,
                int32_t last, int32_t* sums) {
  for (int32_t m = first; m < last; ++m) sums[m - first] = 0;
  for (int32_t b = 0; b < s.codebooks; ++b) {
    const int8_t* const row =
        tables + (static_cast<size_t>(b) * s.centroids + codes[b]) * s.outputs;
    for (int32_t m = first; m < last; ++m) sums[m - first] += row[m];
  }
}

size_t dense8_bytes(int32_t depth, int32_t outputs) { return static_cast<size_t>(depth) * outputs; }

void pack_dense8(int32_t depth, int32_t outputs, const int8_t* weights, uint8_t* packed) {
  for (size_t i = 0; i < dense8_bytes(depth, outputs); ++i) {
    packed[i] = static_cast<uint8_t>(weights[i]);
  }
}

size_t gather8_bytes(int32_t depth) { return static_cast<size_t>(depth) * kRows; }

void gather8(int32_t depth, int32_t taps, const Patch& p, uint8_t* gathered) {
  for (int32_t d = 0; d < depth; ++d) {
    for (int32_t r = 0; r < p.rows; ++r) {
      gathered[d * kRows + r] = static_cast<uint8_t>(entry(p, taps, d, r));
    }
  }
}

void dense8(int32_t depth, int32_t, const uint8_t* packed, const uint8_t* gathered, int32_t first,
            int32_t last, const Epilogue& e) {
  for (int32_t m = first; m < last; ++m) {
    for (int32_t r = 0; r < e.rows; ++r) {
      int32_t sum = 0;
      for (int32_t d = 0; d < depth; ++d) {
        const int32_t w = static_cast<int8_t>(packed[static_cast<size_t>(m) * depth + d]);
        sum += w * gathered[d * kRows + r];
      }
      finish(sum, e, m, r);
    }
  }
}

void dense8_row(int32_t depth, int32_t, const uint8_t* packed, const uint8_t* x, int32_t first,
                int32_t last, int32_t* sums) {
  for (int32_t m = first; m < last; ++m) {
    int32_t sum = 0;
    for (int32_t d = 0; d < depth; ++d) {
      sum += static_cast<int8_t>(packed[static_cast<size_t>(m) * depth + d]) * x[d];
    }
    sums[m - first] = sum;
  }
}

size_t conv8_bytes(const Conv8Shape& s) {
  return static_cast<size_t>(s.outputs) * s.channels * s.taps;
}

void pack_conv8(const Conv8Shape& s, const int8_t* weights, uint8_t* packed) {
  for (size_t i = 0; i < conv8_bytes(s); ++i) packed[i] = static_cast<uint8_t>(weights[i]);
}

size_t conv8_copy_bytes(const Conv8Shape&) { return 0; }
void copy_conv8(const Conv8Shape&, const Patch&, uint8_t*) {}

void conv8(const Conv8Shape& s, const uint8_t* packed, const Patch& p, uint8_t*, int32_t first,
           int32_t last, const Epilogue& e) {
  for (int32_t m = first; m < last; ++m) {
    for (int32_t r = 0; r < e.rows; ++r) {
      const uint8_t* w = packed + static_cast<size_t>(m) * s.channels * s.taps;
      int32_t sum = 0;
      for (int32_t c = 0; c < s.channels; ++c) {
        const uint8_t* const x = p.planes + c / 4 * p.plane + p.row[r] + c % 4;
        for (int32_t t = 0; t < s.taps; ++t) sum += static_cast<int8_t>(*w++) * x[p.tap[t]];
      }
      finish(sum, e, m, r);
    }
  }
}

size_t depthwise8_bytes(const DepthwiseShape& s, int32_t outputs) {
  return static_cast<size_t>(outputs) * s.taps;
}

void pack_depthwise8(const DepthwiseShape& s, int32_t outputs, const int8_t* weights,
                     uint8_t* packed) {
  for (size_t i = 0; i < depthwise8_bytes(s, outputs); ++i) {
    packed[i] = static_cast<uint8_t>(weights[i]);
  }
}

size_t depthwise8_mask_bytes(const DepthwiseShape& s) {
  return static_cast<size_t>(s.taps) * sizeof(uint64_t);
}

void pack_depthwise8_masks(const DepthwiseShape& s, const uint64_t* valid, uint8_t* packed) {
  for (int32_t t = 0; t < s.taps; ++t) reinterpret_cast<uint64_t*>(packed)[t] = valid[t];
}

// Tap t of row r of output m.
template <class T>
T tap_value(const DepthwiseShape& s, const DepthwiseTile<T>& x, int32_t m, int32_t t, int32_t r) {
  if (!(reinterpret_cast<const uint64_t*>(x.masks)[t] >> r & 1)) return x.zero;
  return x.planes[m / s.multiplier * x.plane + x.offset[t] + static_cast<int64_t>(r) * s.step];
}

void depthwise8(const DepthwiseShape& s, const uint8_t* packed, const DepthwiseTile<uint8_t>& x,
                int32_t first, int32_t last, const Epilogue& e) {
  for (int32_t m = first; m < last; ++m) {
    for (int32_t r = 0; r < e.rows; ++r) {
      int32_t sum = 0;
      for (int32_t t = 0; t < s.taps; ++t) {
        const int32_t w = static_cast<int8_t>(packed[static_cast<size_t>(m) * s.taps + t]);
        sum += w * tap_value(s, x, m, t, r);
      }
      finish(sum, e, m, r);
    }
  }
}

void depthwise(const DepthwiseShape& s, const float* weights, const DepthwiseTile<float>& x,
               int32_t first, int32_t last, const Epilogue& e) {
  for (int32_t m = first; m < last; ++m) {
    for (int32_t r = 0; r < e.rows; ++r) {
      float sum = 0.0f;
      for (int32_t t = 0; t < s.taps; ++t) {
        sum =
            std::fmaf(weights[static_cast<size_t>(m) * s.taps + t], tap_value(s, x, m, t, r), sum);
      }
      finish(sum, e, m, r);
    }
  }
}

// Packed responses are the canonical arrays: the table, then the weight indices.
size_t response_bytes(const LookupShape& s) {
  return static_cast<size_t>(s.levels) * s.weights + static_cast<size_t>(s.outputs) * s.depth;
}

void pack_responses(const LookupShape& s, const int8_t* table, const uint8_t* weight,
                    uint8_t* packed) {
  const int32_t entries = s.levels * s.weights;
  for (int32_t i = 0; i < entries; ++i) packed[i] = static_cast<uint8_t>(table[i]);
  const size_t count = static_cast<size_t>(s.outputs) * s.depth;
  for (size_t i = 0; i < count; ++i) packed[entries + i] = weight[i];
}

size_t index_bytes(const LookupShape& s) { return static_cast<size_t>(s.depth) * kRows; }

void gather_indices(const LookupShape& s, const Patch& p, uint8_t* gathered) {
  gather8(s.depth, s.taps, p, gathered);
}

// x: entries `stride` bytes apart
int32_t response(const LookupShape& s, const uint8_t* packed, const uint8_t* x, size_t stride,
                 int32_t m) {
  const uint8_t* const weight = packed + s.levels * s.weights + static_cast<size_t>(m) * s.depth;
  int32_t sum = 0;
  for (int32_t d = 0; d < s.depth; ++d) {
    sum += static_cast<int8_t>(packed[x[d * stride] * s.weights + weight[d]]);
  }
  return sum;
}

void respond(const LookupShape& s, const uint8_t* packed, const uint8_t* gathered, int32_t first,
             int32_t last, const Epilogue& e) {
  for (int32_t m = first; m < last; ++m) {
    for (int32_t r = 0; r < e.rows; ++r) {
      finish(response(s, packed, gathered + r, kRows, m), e, m, r);
    }
  }
}

void respond_row(const LookupShape& s, const uint8_t* packed, const uint8_t* x, int32_t first,
                 int32_t last, int32_t* sums) {
  for (int32_t m = first; m < last; ++m) sums[m - first] = response(s, packed, x, 1, m);
}

void gemm(const float* patch, size_t depth, const float* weights, int32_t outputs,
          const Epilogue& e) {
  for (int32_t m = 0; m < outputs; ++m) {
    const float* w = weights + (m / kGemmOutputs) * depth * kGemmOutputs + m % kGemmOutputs;
    for (int32_t r = 0; r < e.rows; ++r) {
      float sum = 0.0f;
      for (size_t d = 0; d < depth; ++d) {
        sum = std::fmaf(w[d * kGemmOutputs], patch[d * kRows + r], sum);
      }
      finish(sum, e, m, r);
    }
  }
}

void linear(const float* x, size_t x_stride, size_t depth, const float* weights, const float* bias,
            int32_t outputs, float* y) {
  for (int32_t m = 0; m < outputs; ++m) {
    const float* w = weights + (m / kLinearOutputs) * depth * kLinearOutputs + m % kLinearOutputs;
    float sum = 0.0f;
    for (size_t d = 0; d < depth; ++d) {
      sum = std::fmaf(w[d * kLinearOutputs], x[d * x_stride], sum);
    }
    y[m] = sum + bias[m];
  }
}

}  // namespace

constinit const Kernels kScalar = {.name = "scalar",
                                   .needs = 0,
                                   .row_tile = kRows,
                                   .codebook_tile = 1,
                                   .output_tile = 1,
                                   .quantize = quantize,
                                   .encoder_bytes = encoder_bytes,
                                   .pack_nearest = pack_nearest,
                                   .pack_tree = pack_tree,
                                   .table_bytes = table_bytes,
                                   .pack_tables = pack_tables,
                                   .code_bytes = code_bytes,
                                   .encode = encode,
                                   .unpack_codes = unpack_codes,
                                   .code_unit = code_unit,
                                   .unpack_units = unpack_units,
                                   .gather_codes = gather_codes,
                                   .lookup = lookup,
                                   .reads_units = reads_units,
                                   .lookup_units = lookup_units,
                                   .lookup_row = lookup_row,
                                   .dense8_bytes = dense8_bytes,
                                   .pack_dense8 = pack_dense8,
                                   .gather8_bytes = gather8_bytes,
                                   .gather8 = gather8,
                                   .dense8 = dense8,
                                   .dense8_row = dense8_row,
                                   .conv8_bytes = conv8_bytes,
                                   .pack_conv8 = pack_conv8,
                                   .conv8_copy_bytes = conv8_copy_bytes,
                                   .copy_conv8 = copy_conv8,
                                   .conv8 = conv8,
                                   .depthwise8_bytes = depthwise8_bytes,
                                   .pack_depthwise8 = pack_depthwise8,
                                   .depthwise8_mask_bytes = depthwise8_mask_bytes,
                                   .pack_depthwise8_masks = pack_depthwise8_masks,
                                   .depthwise8 = depthwise8,
                                   .depthwise = depthwise,
                                   .response_bytes = response_bytes,
                                   .pack_responses = pack_responses,
                                   .index_bytes = index_bytes,
                                   .gather_indices = gather_indices,
                                   .respond = respond,
                                   .respond_row = respond_row,
                                   .lowbit_quantize = lowbit_quantize,
                                   .lowbit_dense_bytes = lowbit_dense_bytes,
                                   .pack_lowbit_dense = pack_lowbit_dense,
                                   .lowbit_table_bytes = lowbit_table_bytes,
                                   .pack_lowbit_tables = pack_lowbit_tables,
                                   .lowbit_register_bytes = lowbit_register_bytes,
                                   .pack_lowbit_registers = pack_lowbit_registers,
                                   .lowbit_dense = lowbit_dense,
                                   .lowbit_table_depth = lowbit_table_depth,
                                   .lowbit_scratch_bytes = lowbit_scratch_bytes,
                                   .lowbit_tables = lowbit_tables,
                                   .lowbit_register_scratch_bytes = lowbit_register_scratch_bytes,
                                   .lowbit_registers = lowbit_registers,
                                   .lowbit_finish = lowbit_finish,
                                   .gemm = gemm,
                                   .linear = linear,
                                   .function = function,
                                   .bend = bend,
                                   .piecewise = piecewise,
                                   .table_exp = table_exp,
                                   .table_reciprocal = table_reciprocal,
                                   .table_rsqrt = table_rsqrt,
                                   .norm = norm,
                                   .softmax = softmax,
                                   .attention_bytes = attention_bytes,
                                   .attention = attention,
                                   .attention_row_bytes = attention_row_bytes,
                                   .attention_row = attention_row,
                                   .table_grad = table_grad,
                                   .response_grad = response_grad};

}  // namespace lutra
