// AVX2 with FMA, nothing newer: rows in the lanes, tiles of 64 rows as sub-tiles of 32.
//
// The parts are private headers, all in this file's anonymous namespace: avx2_common.h (loads of
// rows, the epilogue), avx2_encode.h, avx2_lookup.h, avx2_dense.h, avx2_conv.h, avx2_depthwise.h,
// avx2_lowbit.h, avx2_lowbit_registers.h, avx2_respond.h (with responses.h), avx2_training.h.
#include <immintrin.h>

#include "avx2_common.h"
#include "avx2_conv.h"
#include "avx2_dense.h"
#include "avx2_depthwise.h"
#include "avx2_encode.h"
#include "avx2_lanes.h"
#include "avx2_lookup.h"
#include "avx2_lowbit.h"
#include "avx2_lowbit_registers.h"
#include "avx2_respond.h"
#include "avx2_training.h"
// After the lanes that they are written in:
#include "attention.h"
#include "attention_row.h"
#include "functions.h"
#include "lowbit_dense.h"
#include "lowbit_tables.h"
#include "piecewise.h"
#include "planes.h"

namespace lutra {
namespace {

void quantize(const float* x, size_t n, const Grid& grid, uint8_t* q) {
  const GridVectors g(grid);
  for (size_t i = 0; i < n; i += 16) {
    const int32_t count = n - i < 16 ? static_cast<int32_t>(n - i) : 16;
    float tail[16] = {};
    for (int32_t j = 0; count < 16 && j < count; ++j) tail[j] = x[i + j];
    const float* const from = count < 16 ? tail : x + i;
    const __m256 a = _mm256_loadu_ps(from), b = _mm256_loadu_ps(from + 8);
    store_bytes(q + i, grid_bytes(quotient(a, g), quotient(b, g), g), count);
  }
}

void piecewise(const Piecewise& p, const float* x, size_t n, float* y) {
  if (p.entries == 8) return piecewise_by_levels<8>(p, x, n, y);
  if (p.entries == 16) return piecewise_by_levels<16>(p, x, n, y);
  piecewise_by_levels<32>(p, x, n, y);
}

void table_grad(const uint8_t* codes, size_t code_stride, int32_t codebooks, int32_t centroids,
                const float* rows, int32_t count, int32_t outputs, float* grad) {
  for (int32_t r = 0; r < count; ++r) {
    const float* const y = rows + static_cast<size_t>(r) * outputs;
    for (int32_t b = 0; b < codebooks; ++b) {
      const size_t cell = static_cast<size_t>(b) * centroids + codes[b * code_stride + r];
      float* const g = grad + cell * outputs;
      int32_t m = 0;
      for (; m + 8 <= outputs; m += 8) {
        _mm256_storeu_ps(g + m, _mm256_add_ps(_mm256_loadu_ps(g + m), _mm256_loadu_ps(y + m)));
      }
      for (; m < outputs; ++m) g[m] += y[m];
    }
  }
}

}  // namespace

constinit const Kernels kAvx2 = {.name = "avx2",
                                 .needs = kFeatureAvx2,
                                 .row_tile = kRows,
                                 .codebook_tile = 4,
                                 .output_tile = kBlock,
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
