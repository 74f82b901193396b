// The WebAssembly kernels, for both of their files: wasm.cc is compiled for every engine with SIMD,
// wasm_dot.cc for those with relaxed SIMD, whose dot products of bytes it takes. Which of the two a
// header is in it knows by the macro __wasm_relaxed_simd__, that the compiler's flags set. All are
// in the anonymous namespace of each.
//
// Rows are in the lanes, tiles of 64 rows as blocks of 16. The parts: wasm_common.h (loads of rows,
// the epilogue), wasm_fma.h, wasm_encode.h, wasm_distances.h, wasm_tables.h, wasm_lookup.h,
// wasm_dense.h, wasm_depthwise.h, wasm_respond.h, wasm_attention.h; wasm_search16.h and
// wasm_dense8.h, or wasm_dot_search16.h and wasm_dot_dense8.h. Low-bit weights and training have
// the scalar kernels.
#pragma once

#include "wasm_common.h"
#include "wasm_dense.h"
#ifdef __wasm_relaxed_simd__
#include "wasm_dot_dense8.h"
#else
#include "wasm_dense8.h"
#endif
#include "wasm_depthwise.h"
#include "wasm_encode.h"
#include "wasm_lanes.h"
#include "wasm_lookup.h"
#include "wasm_respond.h"
// After the lanes that they are written in. Their time goes into calls of fused_call(), so that
// they may be small.
#define LUTRA_SMALL
#pragma clang attribute push(__attribute__((minsize)), apply_to = function)
#include "functions.h"
#include "planes.h"
#include "scalar_lowbit.h"
#include "scalar_training.h"
#include "wasm_attention.h"
#pragma clang attribute pop

namespace lutra {
namespace {

void quantize(const float* x, size_t n, const Grid& grid, uint8_t* q) {
  const Grid g = grid;
  const v128_t scale = wasm_f32x4_splat(g.scale);
  for (size_t i = 0; i < n; i += kBlock) {
    const int32_t count = n - i < kBlock ? static_cast<int32_t>(n - i) : kBlock;
    float tail[kBlock] = {};
    for (int32_t j = 0; count < kBlock && j < count; ++j) tail[j] = x[i + j];
    const float* const from = count < kBlock ? tail : x + i;
    v128_t t[4];
#pragma GCC unroll 4
    for (int32_t j = 0; j < 4; ++j) t[j] = wasm_f32x4_div(load(from + 4 * j), scale);
    store_bytes(q + i, grid_bytes(t, g), count);
  }
}

// Of 31 breakpoints at most, all are compared.
void piecewise(const Piecewise& p, const float* x, size_t n, float* y) {
  const int32_t last = p.entries - 1;
  const v128_t lowest = wasm_f32x4_splat(p.slope[0] == 0.0f ? -kLargest : -__builtin_inff());
  const v128_t highest = wasm_f32x4_splat(p.slope[last] == 0.0f ? kLargest : __builtin_inff());
  for (size_t i = 0; i < n; i += kLanes) {
    const int32_t count = n - i < kLanes ? static_cast<int32_t>(n - i) : kLanes;
    const v128_t v = load_floats(x + i, count).v;
    v128_t entry = zeros();
    for (int32_t b = 0; b < last; ++b) {
      entry = wasm_i32x4_sub(entry, wasm_f32x4_ge(v, wasm_f32x4_splat(p.breakpoint[b])));
    }
    const v128_t inside = minimum({highest}, maximum({lowest}, {v})).v;
    const v128_t slope = entries_of(p.slope, p.entries, entry);
    const v128_t made = fused(slope, inside, entries_of(p.intercept, p.entries, entry));
    store_floats(y + i, {made}, count);
  }
}

constexpr Kernels kernels(const char* name, uint32_t needs) {
  return {.name = name,
          .needs = needs,
          .row_tile = kRows,
          .codebook_tile = 1,
          .output_tile = kOutputs,
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
