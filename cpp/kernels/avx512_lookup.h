// Sums of table entries. Private to avx512.cc.
#pragma once

#include "avx512_encode.h"

namespace lutra {
namespace {

int32_t table_slices(const PqShape& s) { return ceil_div(s.centroids, 16); }

// Packed tables: [block of 4 outputs][group of 4 codebooks][slice][output][64 bytes: 4 codebooks x
// 16].
size_t table_stream(const PqShape& s) {  // bytes of one block of outputs
  return static_cast<size_t>(ceil_div(s.codebooks, kBooks)) * table_slices(s) * kOutputs * 64;
}

size_t table_bytes(const PqShape& s) { return ceil_div(s.outputs, kOutputs) * table_stream(s); }

void pack_tables(const PqShape& s, const int8_t* tables, uint8_t* packed) {
  const int32_t slices = table_slices(s), groups = ceil_div(s.codebooks, kBooks);
  for (int32_t block = 0; block < s.outputs; block += kOutputs) {
    for (int32_t c = 0; c < groups * slices; ++c) {
      const int32_t group = c / slices, entry = c % slices * 16;
      for (int32_t m = block; m < block + kOutputs; ++m) {
        for (int32_t i = 0; i < 64; ++i, ++packed) {
          const int32_t b = book_of(s, group, i / 16), k = entry + i % 16;
          const bool there = m < s.outputs && b < s.codebooks && k < s.centroids;
          const size_t row = static_cast<size_t>(b) * s.centroids + k;
          *packed = there ? static_cast<uint8_t>(tables[row * s.outputs + m]) : 0;
        }
      }
    }
  }
}

// Reads four codebooks of 16 rows.
template <int kSlices>
__m512i read(const uint8_t* t, __m512i index) {
  if constexpr (kSlices == 1) {
    return _mm512_permutexvar_epi8(index, _mm512_loadu_si512(t));
  } else {
    constexpr int kStep = kOutputs * 64;
    const __m512i lower =
        _mm512_permutex2var_epi8(_mm512_loadu_si512(t), index, _mm512_loadu_si512(t + kStep));
    if constexpr (kSlices == 2) return lower;
    const __m512i upper = _mm512_permutex2var_epi8(_mm512_loadu_si512(t + 2 * kStep), index,
                                                   _mm512_loadu_si512(t + 3 * kStep));
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), lower, upper);
  }
}

// 4 kStreams outputs of all rows: one vpermb reads 64 entries, one vpdpbusd with ones adds the four
// codebooks of a row. Limited by vpermb; 12 or 16 accumulators hide its latency.
template <int kSlices, int kBlocks, int kStreams>
void lookup_outputs(const PqShape& s, const uint8_t* tables, const uint8_t* codes, int32_t m,
                    int32_t count, const Epilogue& e) {
  const size_t stream = table_stream(s);
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum[kStreams * kOutputs * kBlocks];
#pragma GCC unroll 16
  for (int32_t i = 0; i < kStreams * kOutputs * kBlocks; ++i) sum[i] = _mm512_setzero_si512();
  for (int32_t c = ceil_div(s.codebooks, kBooks); c > 0; --c) {
    __m512i index[kBlocks];
#pragma GCC unroll 16
    for (int32_t i = 0; i < kBlocks; ++i) index[i] = _mm512_loadu_si512(codes + 64 * i);
#pragma GCC unroll 16
    for (int32_t o = 0; o < kStreams * kOutputs; ++o) {
      const uint8_t* const t = tables + o / kOutputs * stream + o % kOutputs * 64;
#pragma GCC unroll 16
      for (int32_t i = 0; i < kBlocks; ++i) {
        sum[o * kBlocks + i] =
            _mm512_dpbusd_epi32(sum[o * kBlocks + i], ones, read<kSlices>(t, index[i]));
      }
    }
    codes += kBlocks * 64;
    tables += kSlices * kOutputs * 64;
  }
  __m512i sums[kStreams * kOutputs * kBlocks];
#pragma GCC unroll 16
  for (int32_t i = 0; i < kStreams * kOutputs * kBlocks; ++i) _mm512_store_si512(sums + i, sum[i]);
  finish<kBlocks>(sums, e, m, count);
}

// As many outputs at a time as registers allow, then what is left.
template <int kSlices, int kBlocks, int kStreams>
void lookup_range(const PqShape& s, const uint8_t* tables, const uint8_t* codes, int32_t first,
                  int32_t last, const Epilogue& e) {
  constexpr int32_t kStep = kStreams * kOutputs;
  int32_t m = first;
  for (; m + kStep - kOutputs < last; m += kStep) {
    const int32_t count = last - m < kStep ? last - m : kStep;
    lookup_outputs<kSlices, kBlocks, kStreams>(s, tables + m / kOutputs * table_stream(s), codes, m,
                                               count, e);
  }
  if constexpr (kStreams > 1) {
    if (m < last) lookup_range<kSlices, kBlocks, kStreams / 2>(s, tables, codes, m, last, e);
  }
}

template <int kSlices>
void lookup_blocks(const PqShape& s, const uint8_t* tables, const uint8_t* codes, int32_t first,
                   int32_t last, const Epilogue& e) {
  switch (row_blocks(e.rows)) {
    case 1:
      return lookup_range<kSlices, 1, 4>(s, tables, codes, first, last, e);
    case 2:
      return lookup_range<kSlices, 2, 2>(s, tables, codes, first, last, e);
    case 3:
      return lookup_range<kSlices, 3, 1>(s, tables, codes, first, last, e);
    default:
      return lookup_range<kSlices, 4, 1>(s, tables, codes, first, last, e);
  }
}

void lookup(const PqShape& s, const uint8_t* tables, const uint8_t* codes, int32_t first,
            int32_t last, const Epilogue& e) {
  switch (table_slices(s)) {
    case 1:
      return lookup_blocks<1>(s, tables, codes, first, last, e);
    case 2:
      return lookup_blocks<2>(s, tables, codes, first, last, e);
    default:
      return lookup_blocks<4>(s, tables, codes, first, last, e);
  }
}

// --- one row --------------------------------------------------------------------------------
//
// Outputs in the lanes. The bytes of four codebooks are unpacked into dwords of one output, and
// vpdpbusd with ones adds them: 12 instructions for 256 entries, exact. Limited by memory: entries
// are read once, in pieces of 1 KB; the addresses of later codebooks are known, so they are fetched
// ahead. The sums of a piece stay in the first-level cache, in the order of the unpacks.

constexpr int32_t kPiece = 1024;  // outputs
constexpr int32_t kBooksAtOnce = 8;

// sums of 64 outputs += the bytes of eight rows
void add_rows8(const int8_t* const* rows, int32_t at, __mmask64 mask, __m512i* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
#pragma GCC unroll 2
  for (int32_t half = 0; half < kBooksAtOnce; half += 4) {
    __m512i p[4], quads[4];
#pragma GCC unroll 4
    for (int32_t j = 0; j < 4; ++j) p[j] = _mm512_maskz_loadu_epi8(mask, rows[half + j] + at);
    interleave(p, quads);
#pragma GCC unroll 4
    for (int32_t q = 0; q < 4; ++q) sums[q] = _mm512_dpbusd_epi32(sums[q], ones, quads[q]);
  }
}

// Quad q, lane j of 64 sums holds outputs 16 j + 4 q ..
void store_sums(const __m512i* sums, int32_t count, int32_t* to) {
  const __m512i t0 = _mm512_shuffle_i32x4(sums[0], sums[1], 0x44);
  const __m512i t1 = _mm512_shuffle_i32x4(sums[0], sums[1], 0xee);
  const __m512i t2 = _mm512_shuffle_i32x4(sums[2], sums[3], 0x44);
  const __m512i t3 = _mm512_shuffle_i32x4(sums[2], sums[3], 0xee);
  const __m512i natural[4] = {
      _mm512_shuffle_i32x4(t0, t2, 0x88), _mm512_shuffle_i32x4(t0, t2, 0xdd),
      _mm512_shuffle_i32x4(t1, t3, 0x88), _mm512_shuffle_i32x4(t1, t3, 0xdd)};
  for (int32_t q = 0; q < 4 && 16 * q < count; ++q) {
    _mm512_mask_storeu_epi32(to + 16 * q, lane_mask(count - 16 * q), natural[q]);
  }
}

void lookup_row_piece(const PqShape& s, const int8_t* tables, const uint8_t* codes, int32_t count,
                      int32_t* to) {
  alignas(64) static constexpr int8_t kZeros[kPiece] = {};
  const size_t outputs = s.outputs, codebook = static_cast<size_t>(s.centroids) * outputs;
  const auto row = [&](int32_t b) {
    return b < s.codebooks ? tables + b * codebook + codes[b] * outputs : kZeros;
  };
  const int32_t vectors = ceil_div(count, 64), full = count / 64;
  __m512i sums[kPiece / 16];
  for (int32_t i = 0; i < 4 * vectors; ++i) sums[i] = _mm512_setzero_si512();
  const int8_t *rows[kBooksAtOnce], *next[kBooksAtOnce];
  for (int32_t j = 0; j < kBooksAtOnce; ++j) next[j] = row(j);
  for (int32_t b = 0; b < s.codebooks; b += kBooksAtOnce) {
    for (int32_t j = 0; j < kBooksAtOnce; ++j) {
      rows[j] = next[j];
      next[j] = row(b + kBooksAtOnce + j);
    }
    for (int32_t v = 0; v < full; ++v) {
#pragma GCC unroll 8
      for (int32_t j = 0; j < kBooksAtOnce; ++j) {
        _mm_prefetch(reinterpret_cast<const char*>(next[j] + 64 * v), _MM_HINT_T0);
      }
      add_rows8(rows, 64 * v, ~0ull, sums + 4 * v);
    }
    if (full < vectors) add_rows8(rows, 64 * full, byte_mask(count % 64), sums + 4 * full);
  }
  for (int32_t v = 0; v < vectors; ++v) store_sums(sums + 4 * v, count - 64 * v, to + 64 * v);
}

void lookup_row(const PqShape& s, const int8_t* tables, const uint8_t* codes, int32_t first,
                int32_t last, int32_t* sums) {
  for (int32_t m = first; m < last; m += kPiece) {
    const int32_t count = last - m < kPiece ? last - m : kPiece;
    lookup_row_piece(s, tables + m, codes, count, sums + (m - first));
  }
}

}  // namespace
}  // namespace lutra
