// Products of few rows with low-bit weights by lookups in registers. Private to avx512.cc; lowbit.h
// has the order of packed weights.
//
// A register holds four tables of 16 bytes, for 16 weights; vpermb reads 64 entries at once: of 16
// outputs (dwords) one entry of each table. An entry is a 16-bit sum, in two registers: of low
// bytes, which are unsigned, and of high ones. vpdpbusd adds the four bytes of an output to a
// 32-bit sum, so nothing can overflow on the way. For 32 weights of 16 outputs that is a load, two
// indices (three instructions), four vpermb and four vpdpbusd: five and a half cycles for 512
// products, where unpacking bits for vpdpbusd takes twelve.
#pragma once

#include "avx512_lowbit.h"

namespace lutra {
namespace {

inline int32_t register_output(int32_t byte) { return byte / 4; }
inline int32_t register_table(int32_t byte) { return byte % 4; }

// Entry n of a table is the sum of those of four activations whose bit in n is set.
void build_register_tables(const int8_t* x, int32_t weights, uint8_t* tables) {
  // byte 4 n + j: bit j of n
  const __m512i bit = _mm512_set1_epi32(0x08040201);
  const __m512i n = _mm512_shuffle_epi8(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12)));
  const __m512i bits = _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(n, bit), _mm512_set1_epi8(1));
  for (int32_t k = 0; k < weights; k += 16, tables += kRegisterTables) {
#pragma GCC unroll 4
    for (int32_t t = 0; t < 4; ++t) {
      const __m512i four = _mm512_set1_epi32(reinterpret_cast<const int32_t*>(x + k)[t]);
      const __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), bits, four);
      __m128i* const low = reinterpret_cast<__m128i*>(tables + 16 * t);
      _mm_store_si128(low, _mm512_cvtepi32_epi8(sum));
      _mm_store_si128(low + 4, _mm512_cvtepi32_epi8(_mm512_srai_epi32(sum, 8)));
    }
  }
}

// Sums of a plane of kBlocks x 16 outputs, `next` bytes apart.
template <int kBlocks>
LUTRA_INLINE void look_up_plane(int32_t blocks, const uint8_t* weights, size_t next,
                                const uint8_t* tables, __m512i* out) {
  const __m512i ones = _mm512_set1_epi8(1), half = _mm512_set1_epi8(15);
  const __m512i table = _mm512_set1_epi32(0x30201000);  // where each table begins
  constexpr int kMaskThenOr = 0xea;                     // (a & b) | c
  __m512i low[kBlocks], high[kBlocks];
#pragma GCC unroll 4
  for (int32_t b = 0; b < kBlocks; ++b) low[b] = high[b] = _mm512_setzero_si512();
  for (; blocks > 0; --blocks, weights += 64, tables += 2 * kRegisterTables) {
    const __m512i low0 = _mm512_load_si512(tables), high0 = _mm512_load_si512(tables + 64);
    const __m512i low1 = _mm512_load_si512(tables + 128), high1 = _mm512_load_si512(tables + 192);
#pragma GCC unroll 4
    for (int32_t b = 0; b < kBlocks; ++b) {
      const __m512i byte = _mm512_loadu_si512(weights + b * next);
      fetch_ahead(weights + b * next, kBlocks * next);  // of the next outputs
      const __m512i i = _mm512_ternarylogic_epi32(byte, half, table, kMaskThenOr);
      const __m512i j =
          _mm512_ternarylogic_epi32(_mm512_srli_epi32(byte, 4), half, table, kMaskThenOr);
      low[b] = _mm512_dpbusd_epi32(low[b], _mm512_permutexvar_epi8(i, low0), ones);
      high[b] = _mm512_dpbusd_epi32(high[b], ones, _mm512_permutexvar_epi8(i, high0));
      low[b] = _mm512_dpbusd_epi32(low[b], _mm512_permutexvar_epi8(j, low1), ones);
      high[b] = _mm512_dpbusd_epi32(high[b], ones, _mm512_permutexvar_epi8(j, high1));
    }
  }
#pragma GCC unroll 4
  for (int32_t b = 0; b < kBlocks; ++b) {
    out[b] = _mm512_add_epi32(low[b], _mm512_slli_epi32(high[b], 8));
  }
}

template <int kBlocks>
void register_step(const LowBitShape& s, const uint8_t* weights, const uint8_t* tables,
                   int32_t rows, int32_t left, int32_t* sums, size_t stride) {
  const int32_t blocks = register_blocks(s), count = planes(s.levels);
  const size_t plane_bytes = register_plane_bytes(s);
  for (int32_t r = 0; r < rows; ++r, tables += register_row_bytes(s), sums += stride) {
    __m512i total[kBlocks];
    for (int32_t p = 0; p < count; ++p) {
      __m512i sum[kBlocks];
      look_up_plane<kBlocks>(blocks, weights + p * plane_bytes, count * plane_bytes, tables, sum);
#pragma GCC unroll 4
      for (int32_t b = 0; b < kBlocks; ++b) {
        const __m512i part = _mm512_sll_epi32(sum[b], _mm_cvtsi32_si128(p));
        total[b] = p == 0 ? part : _mm512_add_epi32(total[b], part);
      }
    }
#pragma GCC unroll 4
    for (int32_t b = 0; b < kBlocks; ++b) {
      _mm512_mask_storeu_epi32(sums + b * kLowBitOutputs, lane_mask(left - b * kLowBitOutputs),
                               total[b]);
    }
  }
}

void lowbit_registers(const LowBitShape& s, const uint8_t* packed, int32_t group, const int8_t* x,
                      int32_t rows, int32_t first, int32_t last, int32_t* sums, size_t stride,
                      uint8_t* scratch) {
  const int32_t padded = register_blocks(s) * 32;
  for (int32_t r = 0; r < rows; ++r) {
    build_register_tables(x + static_cast<size_t>(r) * padded, padded,
                          scratch + static_cast<size_t>(r) * register_row_bytes(s));
  }
  const size_t block_bytes = planes(s.levels) * register_plane_bytes(s);
  const uint8_t* weights = packed + static_cast<size_t>(group) * register_group_bytes(s) +
                           static_cast<size_t>(first / kLowBitOutputs) * block_bytes;
  int32_t m = first;
  for (; last - m > 3 * kLowBitOutputs; m += 4 * kLowBitOutputs, weights += 4 * block_bytes) {
    register_step<4>(s, weights, scratch, rows, last - m, sums + (m - first), stride);
  }
  for (; m < last; m += kLowBitOutputs, weights += block_bytes) {
    register_step<1>(s, weights, scratch, rows, last - m, sums + (m - first), stride);
  }
}

}  // namespace
}  // namespace lutra
