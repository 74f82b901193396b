// AVX-512 with VBMI, VBMI2 and VNNI (Ice Lake, Zen 4 and later). Tiles of 64 rows.
//
// Rows in the lanes. Four planes of 64 bytes become four registers of 16 dwords, a dword holding
// four values of one row ("quad" q = 0..3). The unpack instructions work inside 128-bit lanes, so
// quad q, lane j, dword i is row 16 j + 4 q + i; packing to bytes, or the 4x4 transpose of lanes in
// `natural_order`, undoes it.
#include <immintrin.h>

#include "packing.h"

namespace lutra {
namespace {

constexpr int32_t kRows = 64;
constexpr int32_t kBooks = 4;    // codebooks whose 16-entry slices share one 64-byte register
constexpr int32_t kOutputs = 4;  // outputs per block of packed tables

struct Quads {
  __m512i q[4];
};

Quads interleave(__m512i p0, __m512i p1, __m512i p2, __m512i p3) {
  const __m512i lo01 = _mm512_unpacklo_epi8(p0, p1), hi01 = _mm512_unpackhi_epi8(p0, p1);
  const __m512i lo23 = _mm512_unpacklo_epi8(p2, p3), hi23 = _mm512_unpackhi_epi8(p2, p3);
  return {{_mm512_unpacklo_epi16(lo01, lo23), _mm512_unpackhi_epi16(lo01, lo23),
           _mm512_unpacklo_epi16(hi01, hi23), _mm512_unpackhi_epi16(hi01, hi23)}};
}

// Quads of int32 -> four registers of rows 0..15, 16..31, 32..47, 48..63.
Quads natural_order(const Quads& a) {
  const __m512i t0 = _mm512_shuffle_i32x4(a.q[0], a.q[1], 0x44);
  const __m512i t1 = _mm512_shuffle_i32x4(a.q[0], a.q[1], 0xee);
  const __m512i t2 = _mm512_shuffle_i32x4(a.q[2], a.q[3], 0x44);
  const __m512i t3 = _mm512_shuffle_i32x4(a.q[2], a.q[3], 0xee);
  return {{_mm512_shuffle_i32x4(t0, t2, 0x88), _mm512_shuffle_i32x4(t0, t2, 0xdd),
           _mm512_shuffle_i32x4(t1, t3, 0x88), _mm512_shuffle_i32x4(t1, t3, 0xdd)}};
}

void quantize(const float* x, size_t n, float scale, int32_t zero, int32_t qmax, uint8_t* q) {
  const __m512 s = _mm512_set1_ps(scale);
  const __m512 low = _mm512_set1_ps(static_cast<float>(-zero));
  const __m512 high = _mm512_set1_ps(static_cast<float>(qmax - zero));
  const __m512i z = _mm512_set1_epi32(zero);
  for (size_t i = 0; i < n; i += 16) {
    const size_t left = n - i;
    const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    __m512 t = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + i), s);
    t = _mm512_min_ps(_mm512_max_ps(t, low), high);  // max returns `low` when t is NaN
    const __m512i v = _mm512_add_epi32(_mm512_cvtps_epi32(t), z);
    _mm512_mask_cvtepi32_storeu_epi8(q + i, mask, v);
  }
}

// One codebook, 64 rows. Per centroid and quad: `groups` dot-product instructions (4 values each),
// one double shift that turns the score into a key (score * 64 + 63 - k), one max.
template <int kGroups>
void encode_book(const uint8_t* patch, int32_t dim, int32_t groups, int32_t centroids,
                 const int32_t* book, uint8_t* codes) {
  const int32_t n = kGroups ? kGroups : groups;
  __m512i x[(kGroups ? kGroups : 16) * 4];
  for (int32_t g = 0; g < n; ++g) {
    __m512i p[4];
    for (int32_t i = 0; i < 4; ++i) {
      const int32_t v = 4 * g + i;
      p[i] = v < dim ? _mm512_load_si512(patch + v * kRows) : _mm512_setzero_si512();
    }
    const Quads quads = interleave(p[0], p[1], p[2], p[3]);
    for (int32_t q = 0; q < 4; ++q) x[4 * g + q] = quads.q[q];
  }
  const int32_t* norms = book + static_cast<size_t>(centroids) * n;
  __m512i best[4];
  for (__m512i& b : best) b = _mm512_set1_epi32(INT32_MIN);
  for (int32_t k = 0; k < centroids; ++k) {
    __m512i score[4];
    for (__m512i& s : score) s = _mm512_set1_epi32(norms[k]);
    for (int32_t g = 0; g < n; ++g) {
      const __m512i c = _mm512_set1_epi32(book[k * n + g]);
      for (int32_t q = 0; q < 4; ++q) score[q] = _mm512_dpbusd_epi32(score[q], x[4 * g + q], c);
    }
    const __m512i tag =
        _mm512_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(63 - k) << (32 - kKeyBits)));
    for (int32_t q = 0; q < 4; ++q) {
      best[q] = _mm512_max_epi32(best[q], _mm512_shldi_epi32(score[q], tag, kKeyBits));
    }
  }
  const __m512i low_bits = _mm512_set1_epi32((1 << kKeyBits) - 1);
  for (__m512i& b : best) b = _mm512_andnot_si512(b, low_bits);  // 63 - (63 - k)
  _mm512_storeu_si512(codes, _mm512_packus_epi16(_mm512_packs_epi32(best[0], best[1]),
                                                 _mm512_packs_epi32(best[2], best[3])));
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
  const __m512i one = _mm512_set1_epi8(1);
  const __m512i leaves = _mm512_set1_epi8(static_cast<char>(s.centroids - 1));
  for (int32_t b = first; b < last; ++b, patch += s.dim * kRows, codes += kRows) {
    const __m512i tree = _mm512_loadu_si512(thresholds + static_cast<size_t>(b) * 64);
    __m512i node = _mm512_setzero_si512();
    for (int32_t l = 0; l < s.dim; ++l) {
      const __m512i tap = _mm512_load_si512(patch + l * kRows);
      const __mmask64 right = _mm512_cmpge_epu8_mask(tap, _mm512_permutexvar_epi8(node, tree));
      node = _mm512_add_epi8(_mm512_add_epi8(node, node), one);
      node = _mm512_mask_add_epi8(node, right, node, one);
    }
    _mm512_storeu_si512(codes, _mm512_sub_epi8(node, leaves));
  }
}

// Packed tables: [output block][group of 4 books][slice][output in block][64 bytes: 4 books x 16].
size_t table_bytes(const PqShape& s) {
  const size_t blocks = (s.outputs + kOutputs - 1) / kOutputs,
               quads = (s.books + kBooks - 1) / kBooks;
  return blocks * quads * table_slices(s) * kOutputs * 64;
}

void pack_tables(const PqShape& s, const int8_t* tables, uint8_t* packed) {
  const int32_t slices = table_slices(s), quads = (s.books + kBooks - 1) / kBooks;
  const int32_t blocks = (s.outputs + kOutputs - 1) / kOutputs;
  for (int32_t block = 0; block < blocks; ++block) {
    for (int32_t quad = 0; quad < quads; ++quad) {
      for (int32_t slice = 0; slice < slices; ++slice) {
        for (int32_t j = 0; j < kOutputs; ++j) {
          const int32_t m = block * kOutputs + j;
          for (int32_t e = 0; e < 64; ++e, ++packed) {
            const int32_t b = quad * kBooks + e / 16, k = slice * 16 + e % 16;
            const bool there = m < s.outputs && b < s.books && k < s.centroids;
            const size_t row = static_cast<size_t>(b) * s.centroids + k;
            *packed = there ? static_cast<uint8_t>(tables[row * s.outputs + m]) : 0;
          }
        }
      }
    }
  }
}

// Planes of codes -> quads of indices: byte j of a dword answers for book 4 c + j and holds
// (code & 15) | j << 4 | (code >> 4) << 6, which is what vpermb and vpermi2b take as they are.
void arrange(int32_t books, const uint8_t* codes, uint8_t* quads) {
  const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(static_cast<char>(0xc0));
  for (int32_t b = 0; b < books; b += kBooks, codes += kBooks * kRows, quads += kBooks * kRows) {
    __m512i p[4];
    for (int32_t j = 0; j < 4; ++j) {
      const __m512i c = _mm512_loadu_si512(codes + j * kRows);
      const __m512i top = _mm512_and_si512(_mm512_slli_epi16(c, 2), high);
      p[j] = _mm512_or_si512(_mm512_or_si512(_mm512_and_si512(c, low), top),
                             _mm512_set1_epi8(static_cast<char>(j << 4)));
    }
    const Quads x = interleave(p[0], p[1], p[2], p[3]);
    for (int32_t q = 0; q < 4; ++q) _mm512_storeu_si512(quads + q * 64, x.q[q]);
  }
}

__mmask16 row_mask(int32_t rows, int32_t first) {
  const int32_t left = rows - first;
  if (left >= 16) return 0xffff;
  return left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

void finish(__m512 y, const Epilogue& e, int32_t m, int32_t row) {
  const __mmask16 mask = row_mask(e.rows, row);
  if (e.residual) {
    const float* residual = e.residual + m * e.residual_stride + row;
    y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, residual));
  }
  if (e.clamp) {
    y = _mm512_min_ps(_mm512_max_ps(y, _mm512_set1_ps(e.low)), _mm512_set1_ps(e.high));
  }
  _mm512_mask_storeu_ps(e.out + m * e.out_stride + row, mask, y);
}

// Reads four books of 16 rows in one permute, sums them in one dot product with ones.
template <int kSlices>
__m512i read(const uint8_t* t, __m512i index) {
  if constexpr (kSlices == 1) {
    return _mm512_permutexvar_epi8(index, _mm512_load_si512(t));
  } else {
    constexpr int kStep = kOutputs * 64;
    const __m512i lower =
        _mm512_permutex2var_epi8(_mm512_load_si512(t), index, _mm512_load_si512(t + kStep));
    if constexpr (kSlices == 2) return lower;
    const __m512i upper = _mm512_permutex2var_epi8(_mm512_load_si512(t + 2 * kStep), index,
                                                   _mm512_load_si512(t + 3 * kStep));
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), lower, upper);
  }
}

template <int kSlices>
void lookup_slices(const PqShape& s, const uint8_t* tables, const uint8_t* quads,
                   const Epilogue& e) {
  const int32_t groups = (s.books + kBooks - 1) / kBooks;
  const __m512i ones = _mm512_set1_epi8(1);
  for (int32_t m = 0; m < s.outputs; m += kOutputs) {
    Quads sum[kOutputs];
    for (Quads& a : sum) {
      for (__m512i& q : a.q) q = _mm512_setzero_si512();
    }
    const uint8_t* index = quads;
    for (int32_t c = 0; c < groups; ++c, index += 256, tables += kSlices * kOutputs * 64) {
      for (int32_t q = 0; q < 4; ++q) {
        const __m512i i = _mm512_loadu_si512(index + q * 64);
        for (int32_t j = 0; j < kOutputs; ++j) {
          sum[j].q[q] = _mm512_dpbusd_epi32(sum[j].q[q], ones, read<kSlices>(tables + j * 64, i));
        }
      }
    }
    for (int32_t j = 0; j < kOutputs && m + j < s.outputs; ++j) {
      const Quads rows = natural_order(sum[j]);
      const __m512 bias = _mm512_set1_ps(e.bias[m + j]);
      for (int32_t q = 0; q < 4 && 16 * q < e.rows; ++q) {
        __m512 y = _mm512_cvtepi32_ps(rows.q[q]);
        if (e.scale) y = _mm512_mul_ps(y, _mm512_set1_ps(e.scale[m + j]));
        finish(_mm512_add_ps(y, bias), e, m + j, 16 * q);
      }
    }
  }
}

void lookup(const PqShape& s, const uint8_t* tables, const uint8_t* codes, uint8_t* workspace,
            const Epilogue& e) {
  arrange(s.books, codes, workspace);
  switch (table_slices(s)) {
    case 1:
      return lookup_slices<1>(s, tables, workspace, e);
    case 2:
      return lookup_slices<2>(s, tables, workspace, e);
    default:
      return lookup_slices<4>(s, tables, workspace, e);
  }
}

// 64 rows x 4 outputs: 16 accumulators, 4 loads and 4 broadcasts for 16 fused multiply-adds.
void gemm(const float* patch, size_t depth, const float* weights, int32_t outputs,
          const Epilogue& e) {
  for (int32_t m = 0; m < outputs; m += kGemmOutputs) {
    __m512 sum[kGemmOutputs][4];
    for (auto& row : sum) {
      for (__m512& s : row) s = _mm512_setzero_ps();
    }
    for (size_t d = 0; d < depth; ++d, weights += kGemmOutputs) {
      __m512 x[4];
      for (int32_t q = 0; q < 4; ++q) x[q] = _mm512_loadu_ps(patch + d * kRows + 16 * q);
      for (int32_t j = 0; j < kGemmOutputs; ++j) {
        const __m512 w = _mm512_set1_ps(weights[j]);
        for (int32_t q = 0; q < 4; ++q) sum[j][q] = _mm512_fmadd_ps(w, x[q], sum[j][q]);
      }
    }
    for (int32_t j = 0; j < kGemmOutputs && m + j < outputs; ++j) {
      const __m512 bias = _mm512_set1_ps(e.bias[m + j]);
      for (int32_t q = 0; q < 4 && 16 * q < e.rows; ++q) {
        __m512 y = sum[j][q];
        if (e.scale) y = _mm512_mul_ps(y, _mm512_set1_ps(e.scale[m + j]));
        finish(_mm512_add_ps(y, bias), e, m + j, 16 * q);
      }
    }
  }
}

void linear(const float* x, size_t x_stride, size_t depth, const float* weights, const float* bias,
            int32_t outputs, float* y) {
  for (int32_t m = 0; m < outputs; m += kLinearOutputs) {
    __m512 sum[4];
    for (__m512& s : sum) s = _mm512_setzero_ps();
    for (size_t d = 0; d < depth; ++d, weights += kLinearOutputs) {
      const __m512 v = _mm512_set1_ps(x[d * x_stride]);
      for (int32_t q = 0; q < 4; ++q) {
        sum[q] = _mm512_fmadd_ps(_mm512_loadu_ps(weights + 16 * q), v, sum[q]);
      }
    }
    for (int32_t q = 0; q < 4; ++q) {
      const __mmask16 mask = row_mask(outputs, m + 16 * q);
      const __m512 b = _mm512_maskz_loadu_ps(mask, bias + m + 16 * q);
      _mm512_storeu_ps(y + m + 16 * q, _mm512_add_ps(sum[q], b));
    }
  }
}

// 16 * kVectors outputs from `first` on; the vectors of a row stay in registers over the books.
// Full vectors do without masks, because masked stores do not forward to the loads that follow.
template <int kVectors, bool kFull>
void add_rows(const uint8_t* codes, size_t code_stride, int32_t books, int32_t centroids,
              const float* rows, int32_t count, int32_t outputs, int32_t first, float* grad) {
  const __mmask16 mask = row_mask(outputs, first + 16 * (kVectors - 1));  // of the last vector
  const size_t book_size = static_cast<size_t>(centroids) * outputs;
  for (int32_t r = 0; r < count; ++r) {
    const float* row = rows + static_cast<size_t>(r) * outputs + first;
    __m512 y[kVectors];
    for (int32_t q = 0; q < kVectors; ++q) {
      y[q] = kFull || q + 1 < kVectors ? _mm512_loadu_ps(row + 16 * q)
                                       : _mm512_maskz_loadu_ps(mask, row + 16 * q);
    }
    float* book = grad + first;
    const uint8_t* code = codes + r;
    for (int32_t b = 0; b < books; ++b, book += book_size, code += code_stride) {
      float* g = book + static_cast<size_t>(*code) * outputs;
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

void table_grad(const uint8_t* codes, size_t code_stride, int32_t books, int32_t centroids,
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
    run(codes, code_stride, books, centroids, rows, count, outputs, m, grad);
  }
}

}  // namespace

constinit const Kernels kAvx512 = {.name = "avx512",
                                   .needs = kFeatureAvx512,
                                   .row_tile = kRows,
                                   .book_tile = kBooks,
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
