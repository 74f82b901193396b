// AVX2: sums of table values by code. Private to avx2.cc.
#pragma once

#include "avx2_encode.h"

namespace lutra {
namespace {

// --- lookup of a tile ----------------------------------------------------------------------------
//
// vpshufb reads 32 rows of a book, as bytes v (value + 128). A byte cannot hold the sum S of many
// books, and widening every v to 16 bits costs three instructions. Instead, up to 64 books are
// summed twice in bytes: modulo 256 (vpaddb), and approximately, by a tree of rounding means
// (vpavgb), which costs one instruction per v like the sum. A mean of two is rounded up by half a
// unit at most, so the root A of a tree with n levels has 2^n A = S + e with 0 <= e <= n 2^(n-1):
// at most 192 for 6 levels, 64 books. e is therefore known from its low byte, 2^n A - sum, and S is
// exact. Three instructions for 32 lookups, two for each load.
//
// Four sums of 64 books fit 16 bits (4 * 64 * 255 < 2^16), further ones are added in 32.
//
// Packed tables: [block of 4 outputs][2 books][slice of 16 entries][output][book][16 entries], and
// zeros for books up to a multiple of 8. Zero tables give zero whatever the codes are. A narrow
// sub-tile (16 rows) reads two books at once, a lane each, and adds the lanes at the end.

constexpr int32_t kTreeSteps = 64;   // reads (of one book, or of two for 16 rows) in a tree
constexpr int32_t kWordSteps = 256;  // reads that are summed in 16 bits

LUTRA_INLINE int32_t table_slices(const PqShape& s) { return (s.centroids + 15) / 16; }

size_t table_bytes(const PqShape& s) {
  const size_t blocks = (s.outputs + kBlock - 1) / kBlock;
  return blocks * padded_books(s) * table_slices(s) * kBlock * 16;
}

void pack_tables(const PqShape& s, const int8_t* tables, uint8_t* packed) {
  const int32_t slices = table_slices(s);
  for (int32_t block = 0; block < s.outputs; block += kBlock) {
    for (int32_t pair = 0; pair < padded_books(s); pair += 2) {
      for (int32_t i = 0; i < slices * kBlock * 2 * 16; ++i) {
        const int32_t k = i / (16 * 2 * kBlock) * 16 + i % 16;
        const int32_t m = block + i / (16 * 2) % kBlock, b = pair + i / 16 % 2;
        const bool there = m < s.outputs && b < s.books && k < s.centroids;
        const size_t row = static_cast<size_t>(b) * s.centroids + k;
        *packed++ = there ? static_cast<uint8_t>(tables[row * s.outputs + m] + 128) : 0;
      }
    }
  }
}

// One read: `step` counts books, or pairs of books if kNarrow.
template <int kSlices, bool kNarrow>
LUTRA_INLINE __m256i read(const uint8_t* tables, int32_t step, int32_t j, const __m256i* index) {
  __m256i v = _mm256_setzero_si256();
  for (int32_t i = 0; i < kSlices; ++i) {
    const int32_t pair = kNarrow ? step : step / 2;
    const uint8_t* const at = tables + ((pair * kSlices + i) * kBlock + j) * 32;
    const __m256i table = kNarrow ? load(at) : broadcast_half(at + step % 2 * 16);
    const __m256i part = _mm256_shuffle_epi8(table, index[i]);
    v = i == 0 ? part : _mm256_or_si256(v, part);
  }
  return v;
}

// Four steps for the four outputs of a block: sum[j] += their values, mean[j] = their mean.
template <int kSlices, bool kNarrow>
LUTRA_INLINE void quad(const uint8_t* tables, const uint8_t* codes, __m256i* sum, __m256i* mean) {
  __m256i index[4][kSlices];
  for (int32_t i = 0; i < 4; ++i) {
    const __m256i code = load(codes + i * 32);
    index[i][0] = code;
    if (kSlices > 1) {  // bit 7 set, and so zero out of vpshufb, outside its own slice
      for (int32_t slice = 0; slice < kSlices; ++slice) {
        const __m256i first = _mm256_set1_epi8(static_cast<char>(16 * slice));
        index[i][slice] = _mm256_adds_epu8(_mm256_sub_epi8(code, first), _mm256_set1_epi8(0x70));
      }
    }
  }
  for (int32_t j = 0; j < kBlock; ++j) {
    const __m256i v0 = read<kSlices, kNarrow>(tables, 0, j, index[0]);
    const __m256i v1 = read<kSlices, kNarrow>(tables, 1, j, index[1]);
    const __m256i v2 = read<kSlices, kNarrow>(tables, 2, j, index[2]);
    const __m256i v3 = read<kSlices, kNarrow>(tables, 3, j, index[3]);
    const __m256i four = _mm256_add_epi8(_mm256_add_epi8(v0, v1), _mm256_add_epi8(v2, v3));
    sum[j] = _mm256_add_epi8(sum[j], four);
    mean[j] = _mm256_avg_epu8(_mm256_avg_epu8(v0, v1), _mm256_avg_epu8(v2, v3));
  }
}

// The root of a tree over `count` nodes, 1..16, into node[0]; the number of its levels is returned.
LUTRA_INLINE int32_t reduce(__m256i (*node)[kBlock], int32_t count) {
  int32_t levels = 0;
  for (; count > 1; count = (count + 1) / 2, ++levels) {
    if (count % 2 != 0) {
      for (int32_t j = 0; j < kBlock; ++j) node[count][j] = _mm256_setzero_si256();
    }
    for (int32_t i = 0; i < count; i += 2) {
      for (int32_t j = 0; j < kBlock; ++j) {
        node[i / 2][j] = _mm256_avg_epu8(node[i][j], node[i + 1][j]);
      }
    }
  }
  return levels;
}

// words[j] = the exact sums of at most 16 quads: rows 0..7, 16..23 and rows 8..15, 24..31.
//
// With T = 2^n A, the exact S has the low byte of `sum`, and T - S < 256: the high byte of S is that
// of T, less 1 if the low byte of T is below that of S.
template <int kSlices, bool kNarrow>
LUTRA_INLINE void tree(const uint8_t* tables, const uint8_t* codes, int32_t quads,
                       __m256i (*words)[2]) {
  __m256i node[kTreeSteps / 4 + 1][kBlock], sum[kBlock];
  for (__m256i& v : sum) v = _mm256_setzero_si256();
  for (int32_t i = 0; i < quads; ++i) {
    quad<kSlices, kNarrow>(tables, codes, sum, node[i]);
    tables += (kNarrow ? 4 : 2) * kSlices * kBlock * 32;
    codes += 4 * 32;
  }
  const int32_t levels = 2 + reduce(node, quads);
  const __m128i up = _mm_cvtsi32_si128(levels), down = _mm_cvtsi32_si128(8 - levels);
  const __m256i high_bits = _mm256_set1_epi8(static_cast<char>(0xff << levels));
  for (int32_t j = 0; j < kBlock; ++j) {
    const __m256i root = node[0][j];
    const __m256i low = _mm256_and_si256(_mm256_sll_epi16(root, up), high_bits);
    const __m256i high = _mm256_andnot_si256(high_bits, _mm256_srl_epi16(root, down));
    const __m256i enough = _mm256_cmpeq_epi8(_mm256_max_epu8(low, sum[j]), low);  // -1: no borrow
    const __m256i exact = _mm256_sub_epi8(_mm256_add_epi8(high, _mm256_set1_epi8(-1)), enough);
    words[j][0] = _mm256_unpacklo_epi8(sum[j], exact);
    words[j][1] = _mm256_unpackhi_epi8(sum[j], exact);
  }
}

// words[j] = the exact sums of at most 256 steps, modulo 2^16 and not beyond.
template <int kSlices, bool kNarrow>
LUTRA_INLINE void trees(const uint8_t* tables, const uint8_t* codes, int32_t steps,
                        __m256i (*words)[2]) {
  for (int32_t i = 0; i < steps; i += kTreeSteps) {
    const int32_t quads = steps - i < kTreeSteps ? (steps - i + 3) / 4 : kTreeSteps / 4;
    __m256i part[kBlock][2];
    tree<kSlices, kNarrow>(tables, codes, quads, part);
    for (int32_t j = 0; j < kBlock; ++j) {
      for (int32_t h = 0; h < 2; ++h) {
        words[j][h] = i == 0 ? part[j][h] : _mm256_add_epi16(words[j][h], part[j][h]);
      }
    }
    tables += kTreeSteps * (kNarrow ? 2 : 1) * kSlices * kBlock * 16;
    codes += kTreeSteps * 32;
  }
}

LUTRA_INLINE __m256i widen(__m256i words, int lane) {
  return _mm256_cvtepu16_epi32(lane ? _mm256_extracti128_si256(words, 1)
                                    : _mm256_castsi256_si128(words));
}

// A block of outputs for the sub-tile that begins at `row`.
template <int kSlices, bool kNarrow>
[[gnu::noinline]] void lookup_block(int32_t books, const uint8_t* tables, const uint8_t* codes,
                                    int32_t m, int32_t last, int32_t row, const Finish& finish) {
  constexpr int32_t kWordTables = kWordSteps * (kNarrow ? 2 : 1) * kSlices * kBlock * 16;
  __m256i words[kBlock][2], total[kBlock][4];  // rows 0..7, 8..15, 16..23, 24..31
  int32_t steps = kNarrow ? (books + 1) / 2 : books;
  const bool many = steps > kWordSteps;
  if (many) {
    for (auto& rows : total) rows[0] = rows[1] = rows[2] = rows[3] = _mm256_setzero_si256();
  }
  for (; steps > kWordSteps; steps -= kWordSteps) {
    trees<kSlices, kNarrow>(tables, codes, kWordSteps, words);
    for (int32_t j = 0; j < kBlock; ++j) {
      for (int32_t q = 0; q < 4; ++q) {
        total[j][q] = _mm256_add_epi32(total[j][q], widen(words[j][q % 2], q / 2));
      }
    }
    tables += kWordTables;
    codes += kWordSteps * 32;
  }
  trees<kSlices, kNarrow>(tables, codes, steps, words);
  for (int32_t j = 0; j < kBlock && m + j < last; ++j) {
    __m256i sum[4];
    for (int32_t q = 0; q < 4; ++q) {
      sum[q] = widen(words[j][q % 2], q / 2);
      if (many) sum[q] = _mm256_add_epi32(sum[q], total[j][q]);
    }
    const int32_t base = -128 * books;
    if (kNarrow) {
      finish.sums(m + j, row, base, _mm256_add_epi32(sum[0], sum[2]),
                  _mm256_add_epi32(sum[1], sum[3]));
    } else {
      finish.sums(m + j, row, base, sum[0], sum[1]);
      finish.sums(m + j, row + 16, base, sum[2], sum[3]);
    }
  }
}

template <int kSlices>
void lookup_slices(const PqShape& s, const uint8_t* tables, const uint8_t* codes, int32_t first,
                   int32_t last, const Epilogue& e) {
  const Finish finish(e);
  const size_t block_bytes = static_cast<size_t>(padded_books(s)) * kSlices * kBlock * 16;
  for (int32_t m = first; m < last; m += kBlock) {
    const uint8_t* const block = tables + m / kBlock * block_bytes;
    for (int32_t row = 0; row < e.rows; row += kSubRows) {
      const uint8_t* const from = codes + static_cast<size_t>(padded_books(s)) * row;
      if (narrow(e.rows - row)) {
        lookup_block<kSlices, true>(s.books, block, from, m, last, row, finish);
      } else {
        lookup_block<kSlices, false>(s.books, block, from, m, last, row, finish);
      }
    }
  }
}

void lookup(const PqShape& s, const uint8_t* tables, const uint8_t* codes, int32_t first,
            int32_t last, const Epilogue& e) {
  switch (table_slices(s)) {
    case 1:
      return lookup_slices<1>(s, tables, codes, first, last, e);
    case 2:
      return lookup_slices<2>(s, tables, codes, first, last, e);
    default:
      return lookup_slices<4>(s, tables, codes, first, last, e);
  }
}

// --- one row -------------------------------------------------------------------------------------
//
// Bound by memory: each code selects a row of M bytes, mostly in a page of its own, which hardware
// prefetchers do not follow. Eight books are walked together, outputs in the lanes, and the rows of
// later books are prefetched meanwhile.

constexpr int32_t kRowBooks = 8;
constexpr int32_t kRowAhead = 16384;  // bytes of rows to be under way, at least

// sums[0..31] += rows[0..7][at..at+31]: bytes of two books side by side, added by vpmaddubsw.
LUTRA_INLINE void add_rows(const int8_t* const* rows, int32_t at, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi8(1);
  __m256i low = _mm256_setzero_si256(), high = low;
  for (int32_t i = 0; i < kRowBooks; i += 2) {
    const __m256i a = load(rows[i] + at), b = load(rows[i + 1] + at);
    low = _mm256_add_epi16(low, _mm256_maddubs_epi16(ones, _mm256_unpacklo_epi8(a, b)));
    high = _mm256_add_epi16(high, _mm256_maddubs_epi16(ones, _mm256_unpackhi_epi8(a, b)));
  }
  const __m128i words[4] = {_mm256_castsi256_si128(low), _mm256_castsi256_si128(high),
                            _mm256_extracti128_si256(low, 1), _mm256_extracti128_si256(high, 1)};
  for (int32_t q = 0; q < 4; ++q) {
    store(sums + 8 * q, _mm256_add_epi32(load(sums + 8 * q), _mm256_cvtepi16_epi32(words[q])));
  }
}

void lookup_row(const PqShape& s, const int8_t* tables, const uint8_t* codes, int32_t first,
                int32_t last, int32_t* sums) {
  const int32_t count = last - first;
  const size_t book = static_cast<size_t>(s.centroids) * s.outputs;
  for (int32_t m = 0; m < count; ++m) sums[m] = 0;
  tables += first;
  const int32_t groups_ahead = 1 + kRowAhead / (kRowBooks * (count + 64));
  int32_t b = 0;
  for (; b + kRowBooks <= s.books; b += kRowBooks) {
    const int8_t *rows[kRowBooks], *later[kRowBooks];
    for (int32_t i = 0; i < kRowBooks; ++i) {
      const int32_t ahead = b + i + groups_ahead * kRowBooks;
      const int32_t next = ahead < s.books ? ahead : b + i;
      rows[i] = tables + (b + i) * book + static_cast<size_t>(codes[b + i]) * s.outputs;
      later[i] = tables + next * book + static_cast<size_t>(codes[next]) * s.outputs;
    }
    int32_t m = 0;
    for (; m + 32 <= count; m += 32) {
      if (m % 64 == 0) {
        for (const int8_t* row : later) _mm_prefetch(row + m, _MM_HINT_T0);
      }
      add_rows(rows, m, sums + m);
    }
    for (; m < count; ++m) {
      for (const int8_t* row : rows) sums[m] += row[m];
    }
  }
  for (; b < s.books; ++b) {
    const int8_t* const row = tables + b * book + static_cast<size_t>(codes[b]) * s.outputs;
    int32_t m = 0;
    for (; m + 8 <= count; m += 8) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + m));
      store(sums + m, _mm256_add_epi32(load(sums + m), _mm256_cvtepi8_epi32(bytes)));
    }
    for (; m < count; ++m) sums[m] += row[m];
  }
}

}  // namespace
}  // namespace lutra
