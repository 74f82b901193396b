// The specification: every other instruction set must give the same bits.
#include <cmath>

#include "kernels.h"

namespace lutra {
namespace {

constexpr int32_t kRows = 16;

size_t centroid_bytes(const PqShape& s) {
  return static_cast<size_t>(s.books) * s.centroids * s.dim;
}

void pack_centroids(const PqShape& s, const uint8_t* centroids, uint8_t* packed) {
  for (size_t i = 0; i < centroid_bytes(s); ++i) packed[i] = centroids[i];
}

size_t table_bytes(const PqShape& s) {
  return static_cast<size_t>(s.books) * s.centroids * s.outputs;
}

void pack_tables(const PqShape& s, const int8_t* tables, uint8_t* packed) {
  for (size_t i = 0; i < table_bytes(s); ++i) packed[i] = static_cast<uint8_t>(tables[i]);
}

void quantize(const float* x, size_t n, float scale, int32_t zero, int32_t qmax, uint8_t* q) {
  const float low = static_cast<float>(-zero), high = static_cast<float>(qmax - zero);
  for (size_t i = 0; i < n; ++i) {
    float t = x[i] / scale;
    t = t > low ? t : low;  // NaN becomes low
    t = t < high ? t : high;
    q[i] = static_cast<uint8_t>(static_cast<int32_t>(std::nearbyintf(t)) + zero);
  }
}

void encode(const PqShape& s, const uint8_t* centroids, int32_t first, int32_t last,
            const uint8_t* patch, uint8_t* codes) {
  for (int32_t b = first; b < last; ++b, patch += s.dim * kRows, codes += kRows) {
    const uint8_t* book = centroids + static_cast<size_t>(b) * s.centroids * s.dim;
    for (int32_t r = 0; r < kRows; ++r) {
      int32_t best = INT32_MIN, code = 0;
      for (int32_t k = 0; k < s.centroids; ++k) {
        int32_t dot = 0, norm = 0;
        for (int32_t v = 0; v < s.dim; ++v) {
          const int32_t c = book[k * s.dim + v];
          dot += c * patch[v * kRows + r];
          norm += c * c;
        }
        const int32_t score = dot - (norm >> 1);
        if (score > best) {
          best = score;
          code = k;
        }
      }
      codes[r] = static_cast<uint8_t>(code);
    }
  }
}

void encode_tree(const PqShape& s, const uint8_t* thresholds, int32_t first, int32_t last,
                 const uint8_t* patch, uint8_t* codes) {
  for (int32_t b = first; b < last; ++b, patch += s.dim * kRows, codes += kRows) {
    const uint8_t* tree = thresholds + static_cast<size_t>(b) * 64;
    for (int32_t r = 0; r < kRows; ++r) {
      int32_t node = 0;
      for (int32_t l = 0; l < s.dim; ++l) {
        node = 2 * node + 1 + (patch[l * kRows + r] >= tree[node] ? 1 : 0);
      }
      codes[r] = static_cast<uint8_t>(node - (s.centroids - 1));
    }
  }
}

void finish(float y, const Epilogue& e, int32_t m, int32_t r) {
  if (e.residual) y += e.residual[m * e.residual_stride + r];
  if (e.clamp) {
    y = y > e.low ? y : e.low;
    y = y < e.high ? y : e.high;
  }
  e.out[m * e.out_stride + r] = y;
}

void lookup(const PqShape& s, const uint8_t* tables, const uint8_t* codes, uint8_t*,
            const Epilogue& e) {
  for (int32_t m = 0; m < s.outputs; ++m) {
    for (int32_t r = 0; r < e.rows; ++r) {
      int32_t sum = 0;
      for (int32_t b = 0; b < s.books; ++b) {
        const size_t row = static_cast<size_t>(b) * s.centroids + codes[b * kRows + r];
        sum += static_cast<int8_t>(tables[row * s.outputs + m]);
      }
      float y = static_cast<float>(sum);
      if (e.scale) y = y * e.scale[m];
      finish(y + e.bias[m], e, m, r);
    }
  }
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
      if (e.scale) sum = sum * e.scale[m];
      finish(sum + e.bias[m], e, m, r);
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

void table_grad(const uint8_t* codes, size_t code_stride, int32_t books, int32_t centroids,
                const float* rows, int32_t count, int32_t outputs, float* grad) {
  for (int32_t r = 0; r < count; ++r) {
    for (int32_t b = 0; b < books; ++b) {
      float* g = grad + (static_cast<size_t>(b) * centroids + codes[b * code_stride + r]) * outputs;
      for (int32_t m = 0; m < outputs; ++m) g[m] += rows[static_cast<size_t>(r) * outputs + m];
    }
  }
}

}  // namespace

constinit const Kernels kScalar = {.name = "scalar",
                                   .needs = 0,
                                   .row_tile = kRows,
                                   .book_tile = 1,
                                   .centroid_bytes = centroid_bytes,
                                   .pack_centroids = pack_centroids,
                                   .table_bytes = table_bytes,
                                   .pack_tables = pack_tables,
                                   .quantize = quantize,
                                   .encode = encode,
                                   .encode_tree = encode_tree,
                                   .lookup = lookup,
                                   .gemm = gemm,
                                   .linear = linear,
                                   .table_grad = table_grad};

}  // namespace lutra
