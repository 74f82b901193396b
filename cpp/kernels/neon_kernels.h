// The NEON kernels, for both of their files: neon.cc is compiled for every AArch64 CPU, neon_dot.cc
// for those with dot products of bytes. Which of the two a header is in it knows by the macro
// __ARM_FEATURE_DOTPROD, that the compiler's flags set. All are in the anonymous namespace of each.
#pragma once

#include "neon_common.h"
#include "neon_dense.h"
#ifdef __ARM_FEATURE_DOTPROD
#include "neon_dot_depthwise8.h"
#else
#include "neon_depthwise8.h"
#endif
#include "neon_encode.h"
#include "neon_lanes.h"
#include "neon_lookup.h"
#include "neon_lowbit.h"
#include "neon_lowbit_registers.h"
#include "neon_respond.h"
#include "neon_training.h"
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
  const Grid g = grid;
  for (size_t i = 0; i < n; i += kBlock) {
    const int32_t count = n - i < kBlock ? static_cast<int32_t>(n - i) : kBlock;
    float tail[kBlock] = {};
    for (int32_t j = 0; count < kBlock && j < count; ++j) tail[j] = x[i + j];
    const float* const from = count < kBlock ? tail : x + i;
    float32x4_t t[4];
    for (int32_t j = 0; j < 4; ++j) t[j] = quotient(vld1q_f32(from + 4 * j), g);
    store_bytes(q + i, grid_bytes(t, g), count);
  }
}

void piecewise(const Piecewise& p, const float* x, size_t n, float* y) {
  if (p.entries == 8) return piecewise_by_levels<8>(p, x, n, y);
  if (p.entries == 16) return piecewise_by_levels<16>(p, x, n, y);
  piecewise_by_levels<32>(p, x, n, y);
}

constexpr Kernels kernels(const char* name, uint32_t needs) {
  return {.name = name,
          .needs = needs,
          .row_tile = kRows,
          .codebook_tile = 2,
          .output_tile = kOutputs,
          .quantize = quantize,
          .encoder_bytes = encoder_bytes,
          .pack_nearest = pack_centroids,
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
          .lookup_row = lookup_row,
          .dense8_bytes = dense8_bytes,
          .pack_dense8 = pack_dense8,
          .gather8_bytes = gather8_bytes,
          .gather8 = gather8,
          .dense8 = dense8,
          .dense8_row = dense8_row,
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
}

}  // namespace
}  // namespace lutra
