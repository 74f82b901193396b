// AVX-512 with VBMI, VBMI2, VNNI and GFNI (Ice Lake, Zen 4 and later). Tiles of 64 rows.
//
// Everything is blocks of 16 rows, a dword lane for each, in natural order: four entries or four
// codes of a row share its dword, vpermb moves or reads 64 bytes, vpdpbusd adds the four. A tile
// has one to four blocks and costs accordingly.
#include "avx512_conv.h"
#include "avx512_dense.h"
#include "avx512_depthwise.h"
#include "avx512_lanes.h"
#include "avx512_lookup.h"
#include "avx512_lowbit.h"
#include "avx512_lowbit_registers.h"
#include "avx512_lowbit_trits.h"
#include "avx512_respond.h"
#include "avx512_training.h"
// After the lanes that they are written in:
#include "attention.h"
#include "attention_row.h"
#include "avx512_cells.h"
#include "functions.h"
#include "lowbit_dense.h"
#include "lowbit_tables.h"
#include "planes.h"

namespace lutra {
namespace {

void quantize(const float* x, size_t n, const Grid& grid, uint8_t* q) {
  const GridVectors g = load_grid(grid);
  for (size_t i = 0; i < n; i += 64) {
    const int32_t left = n - i < 64 ? static_cast<int32_t>(n - i) : 64;
    __m512 t[4];
    for (int32_t j = 0; j < 4; ++j) {
      const __m512 v = _mm512_maskz_loadu_ps(lane_mask(left - 16 * j), x + i + 16 * j);
      t[j] = quotient(v, g);
    }
    _mm512_mask_storeu_epi8(q + i, byte_mask(left), to_bytes<4>(t, g));
  }
}

}  // namespace

constinit const Kernels kAvx512 = {
    .name = "avx512",
    .needs = kFeatureAvx512,
    .row_tile = kRows,
    .codebook_tile = kBooks,
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
    .lowbit_register_bytes = lowbit_few::lowbit_register_bytes,
    .pack_lowbit_registers = lowbit_few::pack_lowbit_registers,
    .lowbit_dense = lowbit_dense,
    .lowbit_table_depth = lowbit_table_depth,
    .lowbit_scratch_bytes = lowbit_scratch_bytes,
    .lowbit_tables = lowbit_tables,
    .lowbit_register_scratch_bytes = lowbit_few::lowbit_register_scratch_bytes,
    .lowbit_registers = lowbit_few::lowbit_registers,
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
