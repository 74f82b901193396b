// Products of few rows with low-bit weights by lookups in registers (T-MAC, arXiv 2407.00088).
// Private to avx2.cc; lowbit.h has the order of packed weights.
//
// A 128-bit lane holds a table of 16 bytes, for four weights; vpshufb reads an entry for each of 16
// outputs from it. An entry is a 16-bit sum, in two registers: of low and of high bytes, which are
// interleaved to words. T-MAC has entries of 8 bits, which are not exact. For 32 weights of 16
// outputs that is two loads, six instructions for indices, eight vpshufb, eight to interleave and
// eight additions: ten cycles for 512 products, where unpacking bits for vpmaddubsw takes twice as
// many.
#pragma once

#include "avx2_lowbit.h"

namespace lutra {
namespace {

// The first 32 bytes are of tables 0 and 1, the others of 2 and 3.
inline int32_t register_output(int32_t byte) { return byte % 16; }
inline int32_t register_table(int32_t byte) { return byte / 16; }

// The 16 sums of four activations: entry n has those whose bit in n is set.
LUTRA_INLINE __m256i register_table_words(const int8_t* x) {
  const __m256i n = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m256i sum = _mm256_setzero_si256();
  LUTRA_UNROLL for (int32_t j = 0; j < 4; ++j) {
    const __m256i bit = _mm256_set1_epi16(static_cast<int16_t>(1 << j));
    const __m256i set = _mm256_cmpeq_epi16(_mm256_and_si256(n, bit), bit);
    sum = _mm256_add_epi16(sum, _mm256_and_si256(set, _mm256_set1_epi16(x[j])));
  }
  return sum;
}

// Of 16 weights: 32 low and 32 high bytes of tables 0 and 1, then of 2 and 3.
void build_register_tables(const int8_t* x, int32_t weights, uint8_t* tables) {
  const __m256i low_half = _mm256_set1_epi16(255);
  for (int32_t k = 0; k < weights; k += 8, tables += 64) {
    const __m256i a = register_table_words(x + k), b = register_table_words(x + k + 4);
    const __m256i low =
        _mm256_packus_epi16(_mm256_and_si256(a, low_half), _mm256_and_si256(b, low_half));
    const __m256i high = _mm256_packs_epi16(_mm256_srai_epi16(a, 8), _mm256_srai_epi16(b, 8));
    store(tables, _mm256_permute4x64_epi64(low, 0xd8));
    store(tables + 32, _mm256_permute4x64_epi64(high, 0xd8));
  }
}

// So many blocks of 32 weights add up to 16-bit sums that fit: an entry is -512..508, and a lane
// gets four of them.
constexpr int32_t kRegisterSteps = 32767 / (4 * 512);

// to += the words of both lanes
LUTRA_INLINE __m256i add_lanes(__m256i to, __m256i words) {
  to = _mm256_add_epi32(to, _mm256_cvtepi16_epi32(_mm256_castsi256_si128(words)));
  return _mm256_add_epi32(to, _mm256_cvtepi16_epi32(_mm256_extracti128_si256(words, 1)));
}

// Sums of a plane of 16 outputs.
LUTRA_INLINE void look_up_plane(int32_t blocks, const uint8_t* weights, const uint8_t* tables,
                                __m256i (&out)[2]) {
  const __m256i half = _mm256_set1_epi8(15);
  out[0] = out[1] = _mm256_setzero_si256();
  while (blocks > 0) {
    const int32_t count = blocks < kRegisterSteps ? blocks : kRegisterSteps;
    blocks -= count;
    __m256i sum0 = _mm256_setzero_si256(), sum1 = sum0;
    for (int32_t b = 0; b < count; ++b, weights += 64, tables += 2 * kRegisterTables) {
      fetch_ahead(weights);
      LUTRA_UNROLL for (int32_t part = 0; part < 4; ++part) {
        // low halves of both loads, then high ones
        __m256i byte = load(weights + 32 * (part % 2));
        if (part >= 2) byte = _mm256_srli_epi16(byte, 4);
        const __m256i i = _mm256_and_si256(byte, half);
        const __m256i low = _mm256_shuffle_epi8(load(tables + 64 * part), i);
        const __m256i high = _mm256_shuffle_epi8(load(tables + 64 * part + 32), i);
        sum0 = _mm256_add_epi16(sum0, _mm256_unpacklo_epi8(low, high));
        sum1 = _mm256_add_epi16(sum1, _mm256_unpackhi_epi8(low, high));
      }
    }
    out[0] = add_lanes(out[0], sum0);
    out[1] = add_lanes(out[1], sum1);
  }
}

void lowbit_registers(const LowBitShape& s, const uint8_t* packed, int32_t group, const int8_t* x,
                      int32_t rows, int32_t first, int32_t last, int32_t* sums, size_t stride,
                      uint8_t* scratch) {
  const int32_t blocks = register_blocks(s), padded = blocks * 32, count = planes(s.levels);
  const size_t row_bytes = register_row_bytes(s), plane_bytes = register_plane_bytes(s);
  for (int32_t r = 0; r < rows; ++r) {
    build_register_tables(x + static_cast<size_t>(r) * padded, padded, scratch + r * row_bytes);
  }
  packed += static_cast<size_t>(group) * register_group_bytes(s) +
            static_cast<size_t>(first / kLowBitOutputs) * count * plane_bytes;
  for (int32_t m = first; m < last; m += kLowBitOutputs, packed += count * plane_bytes) {
    const int32_t left = last - m < kLowBitOutputs ? last - m : kLowBitOutputs;
    const __m256i mask0 = first_dwords(left), mask1 = first_dwords(left - 8);
    for (int32_t r = 0; r < rows; ++r) {
      __m256i total[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
      for (int32_t p = 0; p < count; ++p) {
        __m256i sum[2];
        look_up_plane(blocks, packed + p * plane_bytes, scratch + r * row_bytes, sum);
        const __m128i shift = _mm_cvtsi32_si128(p);
        total[0] = _mm256_add_epi32(total[0], _mm256_sll_epi32(sum[0], shift));
        total[1] = _mm256_add_epi32(total[1], _mm256_sll_epi32(sum[1], shift));
      }
      int32_t* const to = sums + r * stride + (m - first);
      _mm256_maskstore_epi32(to, mask0, total[0]);
      _mm256_maskstore_epi32(to + 8, mask1, total[1]);
    }
  }
}

}  // namespace
}  // namespace lutra
