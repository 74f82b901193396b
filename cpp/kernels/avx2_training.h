// AVX2: what training needs of lookup layers. Private to avx2.cc.
#pragma once

#include "avx2_common.h"

namespace lutra {
namespace {

constexpr int32_t kGradCells = 8;    // accumulators of one pass
constexpr size_t kGradBlock = 2048;  // floats that are added up in single precision at most

LUTRA_INLINE double sum_of(__m256 v) {
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, v);
  double sum = 0.0;
  for (float lane : lanes) sum += static_cast<double>(lane);
  return sum;
}

// Cells first..first+7 of a block of whole vectors.
void add_cells(const uint8_t* index, const float* gradient, size_t n, int32_t first, double* cells,
               int64_t* counts) {
  __m256 sum[kGradCells];
  __m256i count[kGradCells];
  LUTRA_UNROLL
  for (int32_t c = 0; c < kGradCells; ++c) {
    sum[c] = _mm256_setzero_ps();
    count[c] = _mm256_setzero_si256();
  }
  for (size_t i = 0; i < n; i += 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(index + i));
    const __m256i k = _mm256_sub_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(first));
    const __m256 g = _mm256_loadu_ps(gradient + i);
#pragma GCC unroll 8
    for (int32_t c = 0; c < kGradCells; ++c) {
      const __m256i m = _mm256_cmpeq_epi32(k, _mm256_set1_epi32(c));
      count[c] = _mm256_sub_epi32(count[c], m);
      sum[c] = _mm256_add_ps(sum[c], _mm256_and_ps(g, _mm256_castsi256_ps(m)));
    }
  }
  for (int32_t c = 0; c < kGradCells; ++c) {
    alignas(32) int32_t lanes[8];
    store(lanes, count[c]);
    for (int32_t lane : lanes) counts[c] += lane;
    cells[c] += sum_of(sum[c]);
  }
}

void response_grad(const float* x, const uint8_t* index, float* gradient, size_t n, float low,
                   float high, int32_t levels, double* cells, int64_t* counts, double* inside) {
  const size_t whole = n / 8 * 8;
  const __m256 lower = _mm256_set1_ps(low), upper = _mm256_set1_ps(high);
  for (size_t first = 0; first < whole; first += kGradBlock) {
    const size_t some = whole - first < kGradBlock ? whole - first : kGradBlock;
    for (int32_t k = 0; k < levels; k += kGradCells) {
      double c[kGradCells] = {};
      int64_t t[kGradCells] = {};
      add_cells(index + first, gradient + first, some, k, c, t);
      for (int32_t i = 0; i < kGradCells && k + i < levels; ++i) {
        cells[k + i] += c[i];
        counts[k + i] += t[i];
      }
    }
    __m256 sum = _mm256_setzero_ps();
    for (size_t i = first; i < first + some; i += 8) {
      const __m256 v = _mm256_loadu_ps(x + i);
      const __m256 in =
          _mm256_and_ps(_mm256_cmp_ps(v, lower, _CMP_GT_OQ), _mm256_cmp_ps(v, upper, _CMP_LT_OQ));
      const __m256 g = _mm256_and_ps(_mm256_loadu_ps(gradient + i), in);
      sum = _mm256_add_ps(sum, _mm256_mul_ps(g, _mm256_and_ps(v, in)));
      _mm256_storeu_ps(gradient + i, g);
    }
    *inside += sum_of(sum);
  }
  for (size_t i = whole; i < n; ++i) {
    const float g = gradient[i];
    if (index[i] < levels) {
      cells[index[i]] += static_cast<double>(g);
      ++counts[index[i]];
    }
    const bool in = low < x[i] && x[i] < high;
    *inside += in ? static_cast<double>(g) * static_cast<double>(x[i]) : 0.0;
    gradient[i] = in ? g : 0.0f;
  }
}

}  // namespace
}  // namespace lutra
