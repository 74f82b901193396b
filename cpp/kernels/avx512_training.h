// AVX-512: what training needs of lookup layers. Private to avx512.cc.
#pragma once

#include "avx512_common.h"

namespace lutra {
namespace {

constexpr int32_t kGradCells = 16;   // accumulators of one pass
constexpr size_t kGradBlock = 2048;  // floats that are added up in single precision at most

// Cells first..first+15 of a block.
void add_cells(const uint8_t* index, const float* gradient, size_t n, int32_t first, double* cells,
               int64_t* counts) {
  __m512 sum[kGradCells];
  for (__m512& s : sum) s = _mm512_setzero_ps();
  for (size_t i = 0; i < n; i += 64) {
    const int32_t left = n - i < 64 ? static_cast<int32_t>(n - i) : 64;
    const __mmask64 valid = byte_mask(left);
    const __m512i k = _mm512_maskz_loadu_epi8(valid, index + i);
    __m512 g[4];
#pragma GCC unroll 4
    for (int32_t j = 0; j < 4; ++j) {
      g[j] = _mm512_maskz_loadu_ps(lane_mask(left - 16 * j), gradient + i + 16 * j);
    }
#pragma GCC unroll 16
    for (int32_t c = 0; c < kGradCells; ++c) {
      const __mmask64 m =
          _mm512_mask_cmpeq_epi8_mask(valid, k, _mm512_set1_epi8(static_cast<char>(first + c)));
      counts[c] += __builtin_popcountll(m);
#pragma GCC unroll 4
      for (int32_t j = 0; j < 4; ++j) {
        sum[c] = _mm512_mask_add_ps(sum[c], static_cast<__mmask16>(m >> 16 * j), sum[c], g[j]);
      }
    }
  }
  for (int32_t c = 0; c < kGradCells; ++c) {
    cells[c] += static_cast<double>(_mm512_reduce_add_ps(sum[c]));
  }
}

void response_grad(const float* x, const uint8_t* index, float* gradient, size_t n, float low,
                   float high, int32_t levels, double* cells, int64_t* counts, double* inside) {
  const __m512 lower = _mm512_set1_ps(low), upper = _mm512_set1_ps(high);
  for (size_t first = 0; first < n; first += kGradBlock) {
    const size_t some = n - first < kGradBlock ? n - first : kGradBlock;
    for (int32_t k = 0; k < levels; k += kGradCells) {
      double c[kGradCells] = {};
      int64_t t[kGradCells] = {};
      add_cells(index + first, gradient + first, some, k, c, t);
      for (int32_t i = 0; i < kGradCells && k + i < levels; ++i) {
        cells[k + i] += c[i];
        counts[k + i] += t[i];
      }
    }
    __m512 sum = _mm512_setzero_ps();
    for (size_t i = first; i < first + some; i += 16) {
      const int32_t left = first + some - i < 16 ? static_cast<int32_t>(first + some - i) : 16;
      const __m512 v = _mm512_maskz_loadu_ps(lane_mask(left), x + i);
      const __m512 g = _mm512_maskz_loadu_ps(lane_mask(left), gradient + i);
      const __mmask16 in =
          _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(v, lower, _CMP_GT_OQ), v, upper, _CMP_LT_OQ);
      sum = _mm512_mask3_fmadd_ps(g, v, sum, in);
      _mm512_mask_storeu_ps(gradient + i, lane_mask(left), _mm512_maskz_mov_ps(in, g));
    }
    *inside += static_cast<double>(_mm512_reduce_add_ps(sum));
  }
}

}  // namespace
}  // namespace lutra
