// Sums of table entries. Private to avx512.cc.
#pragma once

#include "avx512_encode.h"

namespace lutra {
namespace {

int32_t table_slices(const PqShape& s) { return ceil_div(s.centroids, 16); }

// Packed tables: [block of 4 outputs][group of 4 books][slice][output][64 bytes: 4 books x 16].
size_t table_stream(const PqShape& s) {  // bytes of one block of outputs
  return static_cast<size_t>(ceil_div(s.books, kBooks)) * table_slices(s) * kOutputs * 64;
}

size_t table_bytes(const PqShape& s) { return ceil_div(s.outputs, kOutputs) * table_stream(s); }

void pack_tables(const PqShape& s, const int8_t* tables, uint8_t* packed) {
  const int32_t slices = table_slices(s), groups = ceil_div(s.books, kBooks);
  for (int32_t block = 0; block < s.outputs; block += kOutputs) {
    for (int32_t c = 0; c < groups * slices; ++c) {
      const int32_t book = c / slices * kBooks, entry = c % slices * 16;
      for (int32_t m = block; m < block + kOutputs; ++m) {
        for (int32_t i = 0; i < 64; ++i, ++packed) {
          const int32_t b = book + i / 16, k = entry + i % 16;
          const bool there = m < s.outputs && b < s.books && k < s.centroids;
          const size_t row = static_cast<size_t>(b) * s.centroids + k;
          *packed = there ? static_cast<uint8_t>(tables[row * s.outputs + m]) : 0;
        }
      }
    }
  }
}

// Reads four books of 16 rows.
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
// books of a row. Limited by vpermb; 12 or 16 accumulators hide its latency.
template <int kSlices, int kBlocks, int kStreams>
void lookup_outputs(const PqShape& s, const uint8_t* tables, const uint8_t* codes, int32_t m,
                    int32_t count, const Epilogue& e) {
  const size_t stream = table_stream(s);
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum[kStreams * kOutputs * kBlocks];
#pragma GCC unroll 16
  for (int32_t i = 0; i < kStreams * kOutputs * kBlocks; ++i) sum[i] = _mm512_setzero_si512();
  for (int32_t c = ceil_div(s.books, kBooks); c > 0; --c) {
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
// Outputs in the lanes. The bytes of four books are unpacked into dwords of one output, and
// vpdpbusd with ones adds them: 12 instructions for 256 entries, exact. Limited by memory: each
// entry is read once, and the addresses of later books are known, so they are fetched ahead.

constexpr int32_t kAhead = 8;  // books

template <int kVectors>
void lookup_row_outputs(const PqShape& s, const int8_t* tables, const uint8_t* codes, int32_t first,
                        int32_t count, int32_t* sums) {
  const size_t outputs = s.outputs, book = static_cast<size_t>(s.centroids) * outputs;
  const __mmask64 last = byte_mask(count - 64 * (kVectors - 1));
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum[kVectors * 4];
#pragma GCC unroll 16
  for (int32_t i = 0; i < kVectors * 4; ++i) sum[i] = _mm512_setzero_si512();
  tables += first;
  for (int32_t b = 0; b < s.books; b += kBooks, tables += kBooks * book) {
    const int8_t* row[kBooks];
    bool there[kBooks];
    for (int32_t j = 0; j < kBooks; ++j) {
      there[j] = b + j < s.books;
      row[j] = there[j] ? tables + j * book + codes[b + j] * outputs : tables;
      if (b + j + kAhead >= s.books) continue;
      const int8_t* const next = tables + (j + kAhead) * book + codes[b + j + kAhead] * outputs;
      for (int32_t v = 0; v < kVectors; ++v) {
        _mm_prefetch(reinterpret_cast<const char*>(next + 64 * v), _MM_HINT_T0);
      }
    }
#pragma GCC unroll 4
    for (int32_t v = 0; v < kVectors; ++v) {
      __m512i p[kBooks], quads[4];
#pragma GCC unroll 4
      for (int32_t j = 0; j < kBooks; ++j) {
        const __mmask64 mask = there[j] ? (v + 1 < kVectors ? ~0ull : last) : 0;
        p[j] = _mm512_maskz_loadu_epi8(mask, row[j] + 64 * v);
      }
      interleave(p, quads);
#pragma GCC unroll 4
      for (int32_t q = 0; q < 4; ++q) {
        sum[4 * v + q] = _mm512_dpbusd_epi32(sum[4 * v + q], ones, quads[q]);
      }
    }
  }
#pragma GCC unroll 4
  for (int32_t v = 0; v < kVectors; ++v) {  // quad q, lane j holds outputs 16 j + 4 q ..
    const __m512i t0 = _mm512_shuffle_i32x4(sum[4 * v + 0], sum[4 * v + 1], 0x44);
    const __m512i t1 = _mm512_shuffle_i32x4(sum[4 * v + 0], sum[4 * v + 1], 0xee);
    const __m512i t2 = _mm512_shuffle_i32x4(sum[4 * v + 2], sum[4 * v + 3], 0x44);
    const __m512i t3 = _mm512_shuffle_i32x4(sum[4 * v + 2], sum[4 * v + 3], 0xee);
    const __m512i natural[4] = {
        _mm512_shuffle_i32x4(t0, t2, 0x88), _mm512_shuffle_i32x4(t0, t2, 0xdd),
        _mm512_shuffle_i32x4(t1, t3, 0x88), _mm512_shuffle_i32x4(t1, t3, 0xdd)};
    for (int32_t q = 0; q < 4; ++q) {
      const int32_t at = 64 * v + 16 * q;
      if (at < count) _mm512_mask_storeu_epi32(sums + at, lane_mask(count - at), natural[q]);
    }
  }
}

void lookup_row(const PqShape& s, const int8_t* tables, const uint8_t* codes, int32_t first,
                int32_t last, int32_t* sums) {
  for (int32_t m = first; m < last; m += 256, sums += 256) {
    const int32_t left = last - m;
    auto* const run = left > 192   ? lookup_row_outputs<4>
                      : left > 128 ? lookup_row_outputs<3>
                      : left > 64  ? lookup_row_outputs<2>
                                   : lookup_row_outputs<1>;
    run(s, tables, codes, m, left < 256 ? left : 256, sums);
  }
}

}  // namespace
}  // namespace lutra
