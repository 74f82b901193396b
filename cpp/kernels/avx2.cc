// AVX2 with FMA. Tiles of 32 rows, rows in the lanes.
//
// Four planes of 32 bytes become four registers of 8 dwords, a dword holding four values of one row
// ("quad" q = 0..3): quad q, lane j, dword i is row 16 j + 4 q + i. Packing to bytes undoes it.
#include <immintrin.h>

#include "packing.h"

namespace lutra {
namespace {

constexpr int32_t kRows = 32;
constexpr int32_t kOutputs = 4;  // outputs per block of packed tables

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

void quantize(const float* x, size_t n, float scale, int32_t zero, int32_t qmax, uint8_t* q) {
  const __m256 s = _mm256_set1_ps(scale);
  const __m256 low = _mm256_set1_ps(static_cast<float>(-zero));
  const __m256 high = _mm256_set1_ps(static_cast<float>(qmax - zero));
  const __m256i z = _mm256_set1_epi32(zero);
  for (size_t i = 0; i < n; i += 8) {
    const size_t count = n - i < 8 ? n - i : 8;
    float in[8] = {};
    if (count < 8) {
      for (size_t j = 0; j < count; ++j) in[j] = x[i + j];
    }
    __m256 t = _mm256_div_ps(_mm256_loadu_ps(count < 8 ? in : x + i), s);
    t = _mm256_min_ps(_mm256_max_ps(t, low), high);  // max returns `low` when t is NaN
    const __m256i v = _mm256_add_epi32(_mm256_cvtps_epi32(t), z);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i bytes = _mm_packus_epi16(words, words);
    if (count == 8) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(q + i), bytes);
    } else {
      uint8_t out[16];
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
      for (size_t j = 0; j < count; ++j) q[i + j] = out[j];
    }
  }
}

// One codebook, 32 rows. Values are at most 127, so vpmaddubsw cannot saturate (2 * 127 * 127 <
// 2^15) and it does not matter which operand is the signed one. The score is shifted to key form
// (score * 64 + 63 - k) together with the norm, so that one max keeps the lowest best centroid.
template <int kGroups>
void encode_book(const uint8_t* patch, int32_t dim, int32_t groups, int32_t centroids,
                 const int32_t* book, uint8_t* codes) {
  const int32_t n = kGroups ? kGroups : groups;
  __m256i x[(kGroups ? kGroups : 16) * 4];
  for (int32_t g = 0; g < n; ++g) {
    __m256i p[4];
    for (int32_t i = 0; i < 4; ++i) {
      const int32_t v = 4 * g + i;
      p[i] = v < dim ? load(patch + v * kRows) : _mm256_setzero_si256();
    }
    const __m256i lo01 = _mm256_unpacklo_epi8(p[0], p[1]), hi01 = _mm256_unpackhi_epi8(p[0], p[1]);
    const __m256i lo23 = _mm256_unpacklo_epi8(p[2], p[3]), hi23 = _mm256_unpackhi_epi8(p[2], p[3]);
    x[4 * g + 0] = _mm256_unpacklo_epi16(lo01, lo23);
    x[4 * g + 1] = _mm256_unpackhi_epi16(lo01, lo23);
    x[4 * g + 2] = _mm256_unpacklo_epi16(hi01, hi23);
    x[4 * g + 3] = _mm256_unpackhi_epi16(hi01, hi23);
  }
  const int32_t* keys = book + static_cast<size_t>(centroids) * (n + 1);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i best[4];
  for (__m256i& b : best) b = _mm256_set1_epi32(INT32_MIN);
  for (int32_t k = 0; k < centroids; ++k) {
    __m256i score[4];
    const __m256i first = _mm256_set1_epi32(book[k * n]);
    for (int32_t q = 0; q < 4; ++q) {
      score[q] = _mm256_madd_epi16(_mm256_maddubs_epi16(first, x[q]), ones);
    }
    for (int32_t g = 1; g < n; ++g) {
      const __m256i c = _mm256_set1_epi32(book[k * n + g]);
      for (int32_t q = 0; q < 4; ++q) {
        const __m256i part = _mm256_madd_epi16(_mm256_maddubs_epi16(c, x[4 * g + q]), ones);
        score[q] = _mm256_add_epi32(score[q], part);
      }
    }
    const __m256i key = _mm256_set1_epi32(keys[k]);
    for (int32_t q = 0; q < 4; ++q) {
      const __m256i shifted = _mm256_slli_epi32(score[q], kKeyBits);
      best[q] = _mm256_max_epi32(best[q], _mm256_add_epi32(shifted, key));
    }
  }
  const __m256i low_bits = _mm256_set1_epi32((1 << kKeyBits) - 1);
  for (__m256i& b : best) b = _mm256_andnot_si256(b, low_bits);  // 63 - (63 - k)
  const __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32(best[0], best[1]),
                                             _mm256_packs_epi32(best[2], best[3]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), packed);
}

void encode(const PqShape& s, const uint8_t* packed, int32_t first, int32_t last,
            const uint8_t* patch, uint8_t* codes) {
  const int32_t groups = value_groups(s);
  auto* run = groups == 1   ? encode_book<1>
              : groups == 2 ? encode_book<2>
              : groups == 3 ? encode_book<3>
              : groups == 4 ? encode_book<4>
                            : encode_book<0>;
  for (int32_t b = first; b < last; ++b, patch += s.dim * kRows, codes += kRows) {
    const int32_t* book = reinterpret_cast<const int32_t*>(packed) + b * book_words(s);
    run(patch, s.dim, groups, s.centroids, book, codes);
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

// Packed tables: [output block][book][slice][output in block][16 entries], as value + 128.
size_t table_bytes(const PqShape& s) {
  const size_t blocks = (s.outputs + kOutputs - 1) / kOutputs;
  return blocks * s.books * table_slices(s) * kOutputs * 16;
}

void pack_tables(const PqShape& s, const int8_t* tables, uint8_t* packed) {
  const int32_t slices = table_slices(s);
  for (int32_t block = 0; block * kOutputs < s.outputs; ++block) {
    for (int32_t b = 0; b < s.books; ++b) {
      for (int32_t slice = 0; slice < slices; ++slice) {
        for (int32_t j = 0; j < kOutputs; ++j) {
          for (int32_t e = 0; e < 16; ++e, ++packed) {
            const int32_t m = block * kOutputs + j, k = slice * 16 + e;
            const bool there = m < s.outputs && k < s.centroids;
            const size_t row = static_cast<size_t>(b) * s.centroids + k;
            *packed = there ? static_cast<uint8_t>(tables[row * s.outputs + m] + 128) : 128;
          }
        }
      }
    }
  }
}

void finish(__m256 y, const Epilogue& e, int32_t m, int32_t row) {
  float* out = e.out + m * e.out_stride + row;
  const float* residual = e.residual ? e.residual + m * e.residual_stride + row : nullptr;
  const int32_t left = e.rows - row;
  const bool whole = left >= 8;
  __m256i mask = _mm256_set1_epi32(-1);
  if (!whole) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(left), lane);
  }
  if (residual) {
    y = _mm256_add_ps(y, whole ? _mm256_loadu_ps(residual) : _mm256_maskload_ps(residual, mask));
  }
  if (e.clamp) {
    y = _mm256_min_ps(_mm256_max_ps(y, _mm256_set1_ps(e.low)), _mm256_set1_ps(e.high));
  }
  if (whole) {
    _mm256_storeu_ps(out, y);
  } else {
    _mm256_maskstore_ps(out, mask, y);
  }
}

// At most 256 books are summed in 16 bits: `pairs` adds whole words (even row + 256 * odd row, it
// may wrap), `odd` the high bytes alone, so even = pairs - 256 * odd, modulo 2^16, is exact.
constexpr int32_t kExactBooks = 256;

template <int kSlices>
void lookup_slices(const PqShape& s, const uint8_t* tables, const uint8_t* codes,
                   const Epilogue& e) {
  for (int32_t m = 0; m < s.outputs; m += kOutputs) {
    __m256i sum[kOutputs][4];  // rows 0..7, 8..15, 16..23, 24..31
    for (auto& row : sum) {
      for (__m256i& r : row) r = _mm256_set1_epi32(-128 * s.books);
    }
    for (int32_t first = 0; first < s.books; first += kExactBooks) {
      const int32_t last = s.books - first < kExactBooks ? s.books : first + kExactBooks;
      __m256i pairs[kOutputs], odd[kOutputs];
      for (int32_t j = 0; j < kOutputs; ++j) pairs[j] = odd[j] = _mm256_setzero_si256();
      for (int32_t b = first; b < last; ++b) {
        const __m256i code = load(codes + static_cast<size_t>(b) * kRows);
        __m256i index[kSlices];  // bit 7 set, and so zero out of vpshufb, outside its own slice
        for (int32_t i = 0; i < kSlices; ++i) {
          index[i] = kSlices == 1
                         ? code
                         : _mm256_adds_epu8(
                               _mm256_sub_epi8(code, _mm256_set1_epi8(static_cast<char>(16 * i))),
                               _mm256_set1_epi8(0x70));
        }
        for (int32_t j = 0; j < kOutputs; ++j) {
          __m256i v = _mm256_setzero_si256();
          for (int32_t i = 0; i < kSlices; ++i) {
            const __m128i* t = reinterpret_cast<const __m128i*>(tables + (i * kOutputs + j) * 16);
            const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(t));
            v = _mm256_or_si256(v, _mm256_shuffle_epi8(table, index[i]));
          }
          pairs[j] = _mm256_add_epi16(pairs[j], v);
          odd[j] = _mm256_add_epi16(odd[j], _mm256_srli_epi16(v, 8));
        }
        tables += kSlices * kOutputs * 16;
      }
      for (int32_t j = 0; j < kOutputs; ++j) {
        const __m256i even = _mm256_sub_epi16(pairs[j], _mm256_slli_epi16(odd[j], 8));
        const __m256i low = _mm256_unpacklo_epi16(even, odd[j]);   // rows 0..7 | 16..23
        const __m256i high = _mm256_unpackhi_epi16(even, odd[j]);  // rows 8..15 | 24..31
        const __m128i words[4] = {_mm256_castsi256_si128(low), _mm256_castsi256_si128(high),
                                  _mm256_extracti128_si256(low, 1),
                                  _mm256_extracti128_si256(high, 1)};
        for (int32_t q = 0; q < 4; ++q) {
          sum[j][q] = _mm256_add_epi32(sum[j][q], _mm256_cvtepu16_epi32(words[q]));
        }
      }
    }
    for (int32_t j = 0; j < kOutputs && m + j < s.outputs; ++j) {
      const __m256 bias = _mm256_set1_ps(e.bias[m + j]);
      for (int32_t q = 0; q < 4 && 8 * q < e.rows; ++q) {
        __m256 y = _mm256_cvtepi32_ps(sum[j][q]);
        if (e.scale) y = _mm256_mul_ps(y, _mm256_set1_ps(e.scale[m + j]));
        finish(_mm256_add_ps(y, bias), e, m + j, 8 * q);
      }
    }
  }
}

void lookup(const PqShape& s, const uint8_t* tables, const uint8_t* codes, uint8_t*,
            const Epilogue& e) {
  switch (table_slices(s)) {
    case 1:
      return lookup_slices<1>(s, tables, codes, e);
    case 2:
      return lookup_slices<2>(s, tables, codes, e);
    default:
      return lookup_slices<4>(s, tables, codes, e);
  }
}

// 16 rows x 4 outputs at a time: 8 accumulators, 2 loads and 4 broadcasts for 8 multiply-adds.
void gemm(const float* patch, size_t depth, const float* weights, int32_t outputs,
          const Epilogue& e) {
  for (int32_t m = 0; m < outputs; m += kGemmOutputs, weights += depth * kGemmOutputs) {
    for (int32_t row = 0; row < kRows && row < e.rows; row += 16) {
      __m256 sum[kGemmOutputs][2];
      for (auto& pair : sum) pair[0] = pair[1] = _mm256_setzero_ps();
      for (size_t d = 0; d < depth; ++d) {
        const __m256 x0 = _mm256_loadu_ps(patch + d * kRows + row);
        const __m256 x1 = _mm256_loadu_ps(patch + d * kRows + row + 8);
        for (int32_t j = 0; j < kGemmOutputs; ++j) {
          const __m256 w = _mm256_set1_ps(weights[d * kGemmOutputs + j]);
          sum[j][0] = _mm256_fmadd_ps(w, x0, sum[j][0]);
          sum[j][1] = _mm256_fmadd_ps(w, x1, sum[j][1]);
        }
      }
      for (int32_t j = 0; j < kGemmOutputs && m + j < outputs; ++j) {
        const __m256 bias = _mm256_set1_ps(e.bias[m + j]);
        for (int32_t q = 0; q < 2 && row + 8 * q < e.rows; ++q) {
          __m256 y = sum[j][q];
          if (e.scale) y = _mm256_mul_ps(y, _mm256_set1_ps(e.scale[m + j]));
          finish(_mm256_add_ps(y, bias), e, m + j, row + 8 * q);
        }
      }
    }
  }
}

void linear(const float* x, size_t x_stride, size_t depth, const float* weights, const float* bias,
            int32_t outputs, float* y) {
  for (int32_t m = 0; m < outputs; m += kLinearOutputs) {
    __m256 sum[8];
    for (__m256& s : sum) s = _mm256_setzero_ps();
    for (size_t d = 0; d < depth; ++d, weights += kLinearOutputs) {
      const __m256 v = _mm256_set1_ps(x[d * x_stride]);
      for (int32_t q = 0; q < 8; ++q) {
        sum[q] = _mm256_fmadd_ps(_mm256_loadu_ps(weights + 8 * q), v, sum[q]);
      }
    }
    for (int32_t q = 0; q < 8; ++q) _mm256_storeu_ps(y + m + 8 * q, sum[q]);
    for (int32_t j = m; j < m + kLinearOutputs && j < outputs; ++j) y[j] = y[j] + bias[j];
  }
}

void table_grad(const uint8_t* codes, size_t code_stride, int32_t books, int32_t centroids,
                const float* rows, int32_t count, int32_t outputs, float* grad) {
  for (int32_t r = 0; r < count; ++r) {
    const float* y = rows + static_cast<size_t>(r) * outputs;
    for (int32_t b = 0; b < books; ++b) {
      const size_t cell = static_cast<size_t>(b) * centroids + codes[b * code_stride + r];
      float* g = grad + cell * outputs;
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
                                 .book_tile = 1,
                                 .centroid_bytes = grouped_centroid_bytes,
                                 .pack_centroids = pack_grouped_centroids,
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
