// WebAssembly: packed tables, and which codebooks are added in bytes. Private to wasm_kernels.h.
//
// A swizzle reads 16 rows of a codebook, as bytes v (the value less the least of its codebook and
// output). Where the ranges of up to four codebooks add up to 255 or less, for all four outputs of
// a block, their bytes are added first: a group. The sum of a group is added to 16-bit sums twice:
// as it is, which makes (sum of the even rows) + 256 (sum of the odd rows), and shifted to the odd
// rows alone. Without the swizzles that makes 1.5 instructions for 16 lookups in groups of four, 3
// for a codebook alone. Trained tables have many small ranges: nearly all groups have four.
//
// Packed tables: (blocks of 4 outputs, chunks of 128 codebooks), each a Chunk and the entries of
// its codebooks in the order of the groups: [output][slice of 16 centroids][16 bytes].
#pragma once

#include "table_range.h"
#include "wasm_encode.h"

namespace lutra {
namespace {

constexpr int32_t kChunkBooks = 128;  // 16 bits hold the sums of as many groups
constexpr int32_t kLargestGroup = 4;

struct Chunk {
  int32_t groups[kLargestGroup];  // of 4, 3, 2 and 1 codebooks, which follow each other
  int32_t base[kOutputs];         // the sums of the minima that were subtracted
  uint16_t book[kChunkBooks];     // of each entry, from the first of the chunk
};

LUTRA_INLINE int32_t table_slices(const PqShape& s) { return (s.centroids + 15) / 16; }
LUTRA_INLINE int32_t entry_bytes(const PqShape& s) { return kOutputs * 16 * table_slices(s); }
LUTRA_INLINE int32_t chunks_of(const PqShape& s) {
  return (s.codebooks + kChunkBooks - 1) / kChunkBooks;
}
LUTRA_INLINE size_t chunk_bytes(const PqShape& s, int32_t books) {
  return sizeof(Chunk) + static_cast<size_t>(books) * entry_bytes(s);
}
LUTRA_INLINE size_t output_block_bytes(const PqShape& s) {
  return chunks_of(s) * sizeof(Chunk) + static_cast<size_t>(s.codebooks) * entry_bytes(s);
}

size_t table_bytes(const PqShape& s) {
  return static_cast<size_t>((s.outputs + kOutputs - 1) / kOutputs) * output_block_bytes(s);
}

struct BookRange {
  int32_t book, largest;
  uint8_t range[kOutputs];
};

// Takes the ranges from what a group leaves of a byte. False, and nothing taken, if they do not
// fit.
LUTRA_COLD bool take_range(const BookRange& book, uint8_t* left) {
  for (int32_t j = 0; j < kOutputs; ++j) {
    if (book.range[j] > left[j]) return false;
  }
  for (int32_t j = 0; j < kOutputs; ++j) left[j] = static_cast<uint8_t>(left[j] - book.range[j]);
  return true;
}

// Chooses the groups of codebooks that are sorted by their largest range, ascending: a large one
// gets the smallest that are left.
LUTRA_COLD void choose_groups(const BookRange* sorted, int32_t count, Chunk* chunk) {
  int32_t group[kChunkBooks][kLargestGroup], size[kChunkBooks], groups = 0;
  int32_t small = 0, large = count - 1;
  for (; small <= large; --large, ++groups) {
    uint8_t left[kOutputs] = {255, 255, 255, 255};
    take_range(sorted[large], left);
    group[groups][0] = sorted[large].book;
    size[groups] = 1;
    while (size[groups] < kLargestGroup && small < large && take_range(sorted[small], left)) {
      group[groups][size[groups]++] = sorted[small++].book;
    }
  }
  uint16_t* to = chunk->book;
  for (int32_t i = 0; i < kLargestGroup; ++i) {
    chunk->groups[i] = 0;
    for (int32_t g = 0; g < groups; ++g) {
      if (size[g] != kLargestGroup - i) continue;
      ++chunk->groups[i];
      for (int32_t n = 0; n < size[g]; ++n) *to++ = static_cast<uint16_t>(group[g][n]);
    }
  }
}

// Codebooks first..first+count-1 for the outputs of a block.
LUTRA_COLD void pack_chunk(const PqShape& s, const int8_t* tables, int32_t block, int32_t first,
                           int32_t count, Chunk* chunk) {
  BookRange books[kChunkBooks];
  int32_t least[kChunkBooks][kOutputs], sorted = 0;
  for (int32_t j = 0; j < kOutputs; ++j) chunk->base[j] = 0;
  for (int32_t b = 0; b < count; ++b) {
    BookRange book{b, 0, {}};
    for (int32_t j = 0; j < kOutputs; ++j) {
      int32_t range;
      find_range(s, tables, first + b, block + j, &least[b][j], &range);
      chunk->base[j] += least[b][j];
      book.range[j] = static_cast<uint8_t>(range);
      if (range > book.largest) book.largest = range;
    }
    int32_t at = sorted++;
    for (; at > 0 && books[at - 1].largest > book.largest; --at) books[at] = books[at - 1];
    books[at] = book;
  }
  choose_groups(books, count, chunk);
  uint8_t* to = reinterpret_cast<uint8_t*>(chunk + 1);
  for (int32_t i = 0; i < count; ++i) {
    const int32_t b = chunk->book[i];
    for (int32_t m = block; m < block + kOutputs; ++m) {
      for (int32_t k = 0; k < 16 * table_slices(s); ++k) {
        const size_t row = static_cast<size_t>(first + b) * s.centroids + k;
        const bool there = m < s.outputs && k < s.centroids;
        *to++ = there ? static_cast<uint8_t>(tables[row * s.outputs + m] - least[b][m - block])
                      : uint8_t{0};
      }
    }
  }
}

LUTRA_COLD void pack_tables(const PqShape& s, const int8_t* tables, uint8_t* packed) {
  for (int32_t block = 0; block < s.outputs; block += kOutputs) {
    for (int32_t first = 0; first < s.codebooks; first += kChunkBooks) {
      const int32_t left = s.codebooks - first, count = left < kChunkBooks ? left : kChunkBooks;
      pack_chunk(s, tables, block, first, count, reinterpret_cast<Chunk*>(packed));
      packed += chunk_bytes(s, count);
    }
  }
}

}  // namespace
}  // namespace lutra
