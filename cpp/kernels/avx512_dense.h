// Dense layers: int8 and float32. Private to avx512.cc.
#pragma once

#include "avx512_few_rows.h"
#include "avx512_gather.h"

namespace lutra {
namespace {

// --- int8 -----------------------------------------------------------------------------------
//
// Packed weights: [block of 16 outputs][depth / 4][output][4 bytes], zero padded: a dword to
// broadcast where rows are in the lanes, a register of 16 outputs where outputs are.
// Gathered values: [depth / 4][block of 16 rows][64 bytes], quads as in avx512_gather.h.

constexpr int32_t kDenseBlock = 16;

size_t dense8_bytes(int32_t depth, int32_t outputs) {
  return static_cast<size_t>(ceil_div(outputs, kDenseBlock)) * ceil_div(depth, 4) * 64;
}

void pack_dense8(int32_t depth, int32_t outputs, const int8_t* weights, uint8_t* packed) {
  for (int32_t block = 0; block < outputs; block += kDenseBlock) {
    for (int32_t d = 0; d < depth; d += 4) {
      for (int32_t i = 0; i < 64; ++i, ++packed) {
        const int32_t m = block + i / 4, at = d + i % 4;
        const bool there = m < outputs && at < depth;
        *packed = there ? static_cast<uint8_t>(weights[static_cast<size_t>(m) * depth + at]) : 0;
      }
    }
  }
}

size_t gather8_bytes(int32_t depth) { return static_cast<size_t>(ceil_div(depth, 4)) * 4 * kRows; }

void gather8(int32_t depth, int32_t taps, const Patch& p, uint8_t* gathered) {
  Rows rows;
  find_rows(p, rows);
  ByteRows bytes;
  find_byte_rows(p, bytes);
  QuadFinder finder(p, depth, taps, 4, 4, 63 - rows.reach);
  for (int32_t d = 0; d < depth; d += 4, gathered += rows.blocks * 64) {
    const uint8_t* planes;
    const Quad* quad;
    finder.next(d / 4, planes, quad);
    gather_quads(planes, quad, 1, rows, bytes, gathered);
  }
}

// kCount outputs of kBlocks blocks of rows; `step`: bytes between the quads of a row. Limited by
// vpdpbusd: 16 of them for 4 + 4 loads.
template <int kBlocks, int kCount>
[[gnu::always_inline]] inline void dense8_outputs(int32_t groups, const uint8_t* weights,
                                                  const uint8_t* x, int32_t step, int32_t m,
                                                  int32_t count, const Epilogue& e,
                                                  const GridVectors& grid) {
  __m512i sum[kCount * kBlocks];
#pragma GCC unroll 16
  for (int32_t i = 0; i < kCount * kBlocks; ++i) sum[i] = _mm512_setzero_si512();
  for (; groups > 0; --groups, weights += 64, x += step) {
    __m512i q[kBlocks];
#pragma GCC unroll 16
    for (int32_t i = 0; i < kBlocks; ++i) q[i] = _mm512_loadu_si512(x + 64 * i);
#pragma GCC unroll 16
    for (int32_t o = 0; o < kCount; ++o) {
      const __m512i w = _mm512_set1_epi32(reinterpret_cast<const int32_t*>(weights)[o]);
#pragma GCC unroll 16
      for (int32_t i = 0; i < kBlocks; ++i)
        sum[o * kBlocks + i] = _mm512_dpbusd_epi32(sum[o * kBlocks + i], q[i], w);
    }
  }
  constexpr int32_t kStep = kBatch<kBlocks>;
#pragma GCC unroll 4
  for (int32_t o = 0; o < kCount; o += kStep) {
    const int32_t left = count - o < kStep ? count - o : kStep;
    if (left > 0) finish_sums<kBlocks>(sum + o * kBlocks, e, grid, m + o, left);
  }
}

// kCount must divide the block of 16 packed outputs.
template <int kBlocks, int kCount>
void dense8_range(int32_t depth, const uint8_t* packed, const uint8_t* x, int32_t step,
                  int32_t first, int32_t last, const Epilogue& e) {
  const int32_t groups = ceil_div(depth, 4);
  GridVectors grid;
  if (e.fold_scale) grid = load_grid(e.q[0].grid);
  for (int32_t m = first; m < last;) {
    const uint8_t* const w =
        packed + (static_cast<size_t>(m / kDenseBlock) * groups * 16 + m % kDenseBlock) * 4;
    const int32_t left = last - m;
    if (m % kCount == 0 && left > kCount - kOutputs) {
      dense8_outputs<kBlocks, kCount>(groups, w, x, step, m, left < kCount ? left : kCount, e,
                                      grid);
      m += kCount;
    } else {
      dense8_outputs<kBlocks, kOutputs>(groups, w, x, step, m, left < kOutputs ? left : kOutputs, e,
                                        grid);
      m += kOutputs;
    }
  }
}

void dense8(int32_t depth, int32_t, const uint8_t* packed, const uint8_t* gathered, int32_t first,
            int32_t last, const Epilogue& e) {
  const int32_t groups = ceil_div(depth, 4), step = row_blocks(e.rows) * 64;
  const FewRows few(e.rows, groups, first);
  const Epilogue blocks = few.before(e);
  switch (few.blocks) {
    case 0:
      break;
    case 1:
      dense8_range<1, 16>(depth, packed, gathered, step, first, last, blocks);
      break;
    case 2:
      dense8_range<2, 8>(depth, packed, gathered, step, first, last, blocks);
      break;
    case 3:
      dense8_range<3, 4>(depth, packed, gathered, step, first, last, blocks);
      break;
    default:
      dense8_range<4, 4>(depth, packed, gathered, step, first, last, blocks);
  }
  if (few.rows == 0) return;
  constexpr int32_t kTap = 0;
  const Quads quads{gathered + 64 * few.blocks, step, &kTap, groups, 1};
  few_rows(quads, packed, first, last, few.rows, few.after(e));
}

// 16 kVectors outputs of one row; four sums each hide the latency.
template <int kVectors>
void dense8_row_outputs(int32_t groups, const uint8_t* weights, const uint8_t* x, __m512i* out) {
  __m512i sum[kVectors * 4];
#pragma GCC unroll 16
  for (int32_t i = 0; i < kVectors * 4; ++i) sum[i] = _mm512_setzero_si512();
  const int32_t* const words = reinterpret_cast<const int32_t*>(x);
  const size_t block = static_cast<size_t>(groups) * 64;
  int32_t c = 0;
  for (; c + 4 <= groups; c += 4, weights += 256) {
#pragma GCC unroll 16
    for (int32_t i = 0; i < 4; ++i) {
      const __m512i v = _mm512_set1_epi32(words[c + i]);
#pragma GCC unroll 16
      for (int32_t j = 0; j < kVectors; ++j) {
        const __m512i w = _mm512_loadu_si512(weights + j * block + 64 * i);
        sum[4 * j + i] = _mm512_dpbusd_epi32(sum[4 * j + i], v, w);
      }
    }
  }
  for (; c < groups; ++c, weights += 64) {
    const __m512i v = _mm512_set1_epi32(words[c]);
#pragma GCC unroll 16
    for (int32_t j = 0; j < kVectors; ++j) {
      const __m512i w = _mm512_loadu_si512(weights + j * block);
      sum[4 * j + 0] = _mm512_dpbusd_epi32(sum[4 * j + 0], v, w);
    }
  }
#pragma GCC unroll 16
  for (int32_t j = 0; j < kVectors; ++j) {
    out[j] = _mm512_add_epi32(_mm512_add_epi32(sum[4 * j + 0], sum[4 * j + 1]),
                              _mm512_add_epi32(sum[4 * j + 2], sum[4 * j + 3]));
  }
}

void dense8_row(int32_t depth, int32_t outputs, const uint8_t* packed, const uint8_t* x,
                int32_t first, int32_t last, int32_t* sums) {
  const int32_t groups = ceil_div(depth, 4);
  int32_t block = first / kDenseBlock * kDenseBlock;
  while (block < last) {
    const uint8_t* const weights = packed + static_cast<size_t>(block) * groups * 4;
    const bool four = ceil_div(outputs - block, kDenseBlock) >= 4;
    __m512i out[4];
    if (four) {
      dense8_row_outputs<4>(groups, weights, x, out);
    } else {
      dense8_row_outputs<1>(groups, weights, x, out);
    }
    for (int32_t j = 0; j < (four ? 4 : 1); ++j, block += kDenseBlock) {
      const int32_t skip = first > block ? first - block : 0;
      if (block >= last || skip >= kDenseBlock) continue;
      const __mmask16 from = static_cast<__mmask16>(0xffffu << skip);
      const __m512i v = _mm512_maskz_compress_epi32(from, out[j]);
      const int32_t m = block + skip, end = block + kDenseBlock < last ? block + kDenseBlock : last;
      _mm512_mask_storeu_epi32(sums + (m - first), lane_mask(end - m), v);
    }
  }
}

// --- float32 --------------------------------------------------------------------------------

// 64 rows x 4 outputs: 16 accumulators, 4 loads and 4 broadcasts for 16 fused multiply-adds. Fewer
// rows take fewer accumulators; the order of a sum is that of `depth` in any case.
template <int kBlocks>
void gemm_blocks(const float* patch, size_t depth, const float* weights, int32_t outputs,
                 const Epilogue& e) {
  for (int32_t m = 0; m < outputs; m += kGemmOutputs) {
    __m512 sum[kGemmOutputs * kBlocks];
#pragma GCC unroll 16
    for (int32_t i = 0; i < kGemmOutputs * kBlocks; ++i) sum[i] = _mm512_setzero_ps();
    for (size_t d = 0; d < depth; ++d, weights += kGemmOutputs) {
      __m512 x[kBlocks];
#pragma GCC unroll 16
      for (int32_t i = 0; i < kBlocks; ++i) x[i] = _mm512_loadu_ps(patch + d * kRows + 16 * i);
#pragma GCC unroll 16
      for (int32_t j = 0; j < kGemmOutputs; ++j) {
        const __m512 w = _mm512_set1_ps(weights[j]);
#pragma GCC unroll 16
        for (int32_t i = 0; i < kBlocks; ++i)
          sum[j * kBlocks + i] = _mm512_fmadd_ps(w, x[i], sum[j * kBlocks + i]);
      }
    }
    __m512 sums[kGemmOutputs * kBlocks];
#pragma GCC unroll 16
    for (int32_t i = 0; i < kGemmOutputs * kBlocks; ++i) _mm512_store_ps(sums + i, sum[i]);
    finish<kBlocks>(sums, e, m, outputs - m < kGemmOutputs ? outputs - m : kGemmOutputs);
  }
}

void gemm(const float* patch, size_t depth, const float* weights, int32_t outputs,
          const Epilogue& e) {
  switch (row_blocks(e.rows)) {
    case 1:
      return gemm_blocks<1>(patch, depth, weights, outputs, e);
    case 2:
      return gemm_blocks<2>(patch, depth, weights, outputs, e);
    case 3:
      return gemm_blocks<3>(patch, depth, weights, outputs, e);
    default:
      return gemm_blocks<4>(patch, depth, weights, outputs, e);
  }
}

void linear(const float* x, size_t x_stride, size_t depth, const float* weights, const float* bias,
            int32_t outputs, float* y) {
  for (int32_t m = 0; m < outputs; m += kLinearOutputs) {
    __m512 sum[4];
#pragma GCC unroll 16
    for (int32_t q = 0; q < 4; ++q) sum[q] = _mm512_setzero_ps();
    for (size_t d = 0; d < depth; ++d, weights += kLinearOutputs) {
      const __m512 v = _mm512_set1_ps(x[d * x_stride]);
#pragma GCC unroll 16
      for (int32_t q = 0; q < 4; ++q) {
        sum[q] = _mm512_fmadd_ps(_mm512_loadu_ps(weights + 16 * q), v, sum[q]);
      }
    }
#pragma GCC unroll 16
    for (int32_t q = 0; q < 4; ++q) {
      const __mmask16 mask = lane_mask(outputs - m - 16 * q);
      const __m512 b = _mm512_maskz_loadu_ps(mask, bias + m + 16 * q);
      _mm512_storeu_ps(y + m + 16 * q, _mm512_add_ps(sum[q], b));
    }
  }
}

// --- gradient of tables ---------------------------------------------------------------------

// 16 * kVectors outputs from `first` on; the vectors of a row stay in registers over the codebooks.
// Full vectors do without masks, because masked stores do not forward to the loads that follow.
template <int kVectors, bool kFull>
void add_rows(const uint8_t* codes, size_t code_stride, int32_t codebooks, int32_t centroids,
              const float* rows, int32_t count, int32_t outputs, int32_t first, float* grad) {
  const __mmask16 mask = lane_mask(outputs - first - 16 * (kVectors - 1));  // of the last vector
  const size_t codebook_size = static_cast<size_t>(centroids) * outputs;
  for (int32_t r = 0; r < count; ++r) {
    const float* row = rows + static_cast<size_t>(r) * outputs + first;
    __m512 y[kVectors];
#pragma GCC unroll 16
    for (int32_t q = 0; q < kVectors; ++q) {
      y[q] = kFull || q + 1 < kVectors ? _mm512_loadu_ps(row + 16 * q)
                                       : _mm512_maskz_loadu_ps(mask, row + 16 * q);
    }
    float* codebook = grad + first;
    const uint8_t* code = codes + r;
    for (int32_t b = 0; b < codebooks; ++b, codebook += codebook_size, code += code_stride) {
      float* g = codebook + static_cast<size_t>(*code) * outputs;
      for (int32_t q = 0; q < kVectors - (kFull ? 0 : 1); ++q) {
        _mm512_storeu_ps(g + 16 * q, _mm512_add_ps(_mm512_loadu_ps(g + 16 * q), y[q]));
      }
      if constexpr (kFull) continue;
      float* last = g + 16 * (kVectors - 1);
      const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, last), y[kVectors - 1]);
      _mm512_mask_storeu_ps(last, mask, sum);
    }
  }
}

void table_grad(const uint8_t* codes, size_t code_stride, int32_t codebooks, int32_t centroids,
                const float* rows, int32_t count, int32_t outputs, float* grad) {
  for (int32_t m = 0; m < outputs; m += 64) {
    const int32_t left = outputs - m;
    auto* run = left >= 64   ? add_rows<4, true>
                : left > 48  ? add_rows<4, false>
                : left == 48 ? add_rows<3, true>
                : left > 32  ? add_rows<3, false>
                : left == 32 ? add_rows<2, true>
                : left > 16  ? add_rows<2, false>
                : left == 16 ? add_rows<1, true>
                             : add_rows<1, false>;
    run(codes, code_stride, codebooks, centroids, rows, count, outputs, m, grad);
  }
}

}  // namespace
}  // namespace lutra
