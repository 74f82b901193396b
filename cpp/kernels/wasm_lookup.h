// WebAssembly: sums of table entries by code. Private to wasm_kernels.h. wasm_tables.h says how.
//
// A block of 16 rows and 4 outputs at a time: eight sums of 16 bits, and the codes of a group, are
// in registers; entries are loaded once for each block of rows.
#pragma once

#include "wasm_tables.h"

namespace lutra {
namespace {

// Where the codes of the codebooks of a chunk are.
struct TileReads {  // encode()'s order
  const uint8_t* codes;
  LUTRA_INLINE v128_t at(int32_t book) const { return load(codes + book * kBlock); }
};
struct PlaneReads {  // planes of codes
  const uint8_t* codes;
  const int64_t* offset;
  LUTRA_INLINE v128_t at(int32_t book) const {
    return load(codes + static_cast<int32_t>(offset[book]));
  }
};

// The sums of groups for an output and 16 rows.
struct GroupSum {
  v128_t all = zeros(), odd = all;

  LUTRA_INLINE void add(v128_t bytes) {
    all = wasm_i16x8_add(all, bytes);
    odd = wasm_i16x8_add(odd, wasm_u16x8_shr(bytes, 8));
  }
  // total[0..3] += rows 0..3, 4..7, ... At most 128 groups: no sum of rows overflows but that of
  // all, whose odd ones are known.
  LUTRA_INLINE void resolve(v128_t* total) const {
    const v128_t even = wasm_i16x8_sub(all, wasm_i16x8_shl(odd, 8));
    const v128_t low = wasm_i16x8_shuffle(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
    const v128_t high = wasm_i16x8_shuffle(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
    total[0] = wasm_i32x4_add(total[0], wasm_u32x4_extend_low_u16x8(low));
    total[1] = wasm_i32x4_add(total[1], wasm_u32x4_extend_high_u16x8(low));
    total[2] = wasm_i32x4_add(total[2], wasm_u32x4_extend_low_u16x8(high));
    total[3] = wasm_i32x4_add(total[3], wasm_u32x4_extend_high_u16x8(high));
  }
};

// The entries of a codebook and an output at the codes of 16 rows. A swizzle gives zeros outside of
// its own slice.
template <int kSlices>
LUTRA_INLINE v128_t entries_at(const uint8_t* entries, const v128_t* index) {
  v128_t v = wasm_i8x16_swizzle(load(entries), index[0]);
#pragma GCC unroll 4
  for (int32_t i = 1; i < kSlices; ++i) {
    v = wasm_v128_or(v, wasm_i8x16_swizzle(load(entries + 16 * i), index[i]));
  }
  return v;
}

template <int kSlices, int kSize, class Reads>
LUTRA_INLINE void add_groups(int32_t groups, const uint8_t*& entries, const uint16_t*& book,
                             const Reads& codes, GroupSum& s0, GroupSum& s1, GroupSum& s2,
                             GroupSum& s3) {
  constexpr int32_t kOutput = 16 * kSlices, kEntry = kOutputs * kOutput;
  for (; groups > 0; --groups, entries += kSize * kEntry, book += kSize) {
    v128_t index[kSize][kSlices];
#pragma GCC unroll 4
    for (int32_t n = 0; n < kSize; ++n) {
      index[n][0] = codes.at(book[n]);
#pragma GCC unroll 4
      for (int32_t i = 1; i < kSlices; ++i) {
        index[n][i] = wasm_i8x16_sub(index[n][i - 1], wasm_i8x16_splat(16));
      }
    }
    const auto sum = [&](int32_t j) __attribute__((always_inline)) {
      v128_t v = entries_at<kSlices>(entries + j * kOutput, index[0]);
#pragma GCC unroll 4
      for (int32_t n = 1; n < kSize; ++n) {
        v = wasm_i8x16_add(v, entries_at<kSlices>(entries + n * kEntry + j * kOutput, index[n]));
      }
      return v;
    };
    s0.add(sum(0));
    s1.add(sum(1));
    s2.add(sum(2));
    s3.add(sum(3));
  }
}

template <int kSlices, class Reads>
LUTRA_INLINE void add_chunk(const Chunk& chunk, const Reads& codes, v128_t (*total)[4]) {
  GroupSum s0, s1, s2, s3;
  const uint8_t* entries = reinterpret_cast<const uint8_t*>(&chunk + 1);
  const uint16_t* book = chunk.book;
  add_groups<kSlices, 4>(chunk.groups[0], entries, book, codes, s0, s1, s2, s3);
  add_groups<kSlices, 3>(chunk.groups[1], entries, book, codes, s0, s1, s2, s3);
  add_groups<kSlices, 2>(chunk.groups[2], entries, book, codes, s0, s1, s2, s3);
  add_groups<kSlices, 1>(chunk.groups[3], entries, book, codes, s0, s1, s2, s3);
  s0.resolve(total[0]);
  s1.resolve(total[1]);
  s2.resolve(total[2]);
  s3.resolve(total[3]);
}

// Outputs m.. of a block, 16 rows from `row`; reads(first codebook of a chunk) tells where codes
// are.
template <int kSlices, class Source>
[[gnu::noinline]] void lookup_block(const PqShape& s, const uint8_t* tables, const Source& reads,
                                    int32_t m, int32_t last, int32_t row, const Finish& finish) {
  v128_t total[kOutputs][4];
  int32_t base[kOutputs] = {};
  for (auto& t : total) t[0] = t[1] = t[2] = t[3] = zeros();
  for (int32_t first = 0; first < s.codebooks; first += kChunkBooks) {
    const Chunk& chunk = *reinterpret_cast<const Chunk*>(tables);
    const int32_t left = s.codebooks - first, count = left < kChunkBooks ? left : kChunkBooks;
    add_chunk<kSlices>(chunk, reads(row, first), total);
    for (int32_t j = 0; j < kOutputs; ++j) base[j] += chunk.base[j];
    tables += chunk_bytes(s, count);
  }
  for (int32_t j = 0; j < kOutputs && m + j < last; ++j) {
    finish.sums(m + j, row, base[j], total[j]);
  }
}

template <int kSlices, class Source>
void lookup_outputs(const PqShape& s, const uint8_t* tables, const Source& reads, int32_t first,
                    int32_t last, const Epilogue& e) {
  const Finish finish(e);
  for (int32_t m = first; m < last; m += kOutputs) {
    const uint8_t* const from = tables + m / kOutputs * output_block_bytes(s);
    for (int32_t row = 0; row < e.rows; row += kBlock) {
      lookup_block<kSlices>(s, from, reads, m, last, row, finish);
    }
  }
}

void lookup(const PqShape& s, const uint8_t* tables, const uint8_t* codes, int32_t first,
            int32_t last, const Epilogue& e) {
  const auto reads = [&](int32_t row, int32_t book) {
    return TileReads{codes + row / kBlock * block_bytes(s) + book * kBlock};
  };
  switch (table_slices(s)) {
    case 1:
      return lookup_outputs<1>(s, tables, reads, first, last, e);
    case 2:
      return lookup_outputs<2>(s, tables, reads, first, last, e);
    default:
      return lookup_outputs<4>(s, tables, reads, first, last, e);
  }
}

bool reads_units(const PqShape& s) { return table_slices(s) == 1; }

void lookup_units(const PqShape& s, const uint8_t* tables, const CodeTile& tile, int32_t first,
                  int32_t last, const Epilogue& e) {
  static_assert(kBlock == kRowBlock);
  const auto reads = [&](int32_t row, int32_t book) {
    return PlaneReads{tile.planes + tile.block[row / kBlock], tile.offset + book};
  };
  lookup_outputs<1>(s, tables, reads, first, last, e);
}

// --- one row -------------------------------------------------------------------------------------
//
// Each code selects a row of M bytes. Eight codebooks are walked together, outputs in the lanes.

constexpr int32_t kRowBooks = 8;

// sums[0..15] += rows[0..count-1][at..at+15]
LUTRA_INLINE void add_rows(const int8_t* const* rows, int32_t count, int32_t at, int32_t* sums) {
  v128_t low = zeros(), high = low;
  for (int32_t i = 0; i < count; ++i) {
    const v128_t v = load(rows[i] + at);
    low = wasm_i16x8_add(low, wasm_i16x8_extend_low_i8x16(v));
    high = wasm_i16x8_add(high, wasm_i16x8_extend_high_i8x16(v));
  }
  store(sums, wasm_i32x4_add(load(sums), wasm_i32x4_extend_low_i16x8(low)));
  store(sums + 4, wasm_i32x4_add(load(sums + 4), wasm_i32x4_extend_high_i16x8(low)));
  store(sums + 8, wasm_i32x4_add(load(sums + 8), wasm_i32x4_extend_low_i16x8(high)));
  store(sums + 12, wasm_i32x4_add(load(sums + 12), wasm_i32x4_extend_high_i16x8(high)));
}

void lookup_row(const PqShape& s, const int8_t* tables, const uint8_t* codes, int32_t first,
                int32_t last, int32_t* sums) {
  const int32_t count = last - first;
  const size_t codebook = static_cast<size_t>(s.centroids) * s.outputs;
  for (int32_t m = 0; m < count; ++m) sums[m] = 0;
  tables += first;
  for (int32_t b = 0; b < s.codebooks; b += kRowBooks) {
    const int32_t books = s.codebooks - b < kRowBooks ? s.codebooks - b : kRowBooks;
    const int8_t* rows[kRowBooks];
    for (int32_t i = 0; i < books; ++i) {
      rows[i] = tables + (b + i) * codebook + static_cast<size_t>(codes[b + i]) * s.outputs;
    }
    int32_t m = 0;
    for (; m + 16 <= count; m += 16) add_rows(rows, books, m, sums + m);
    for (; m < count; ++m) {
      for (int32_t i = 0; i < books; ++i) sums[m] += rows[i][m];
    }
  }
}

}  // namespace
}  // namespace lutra
