// AVX2: packed tables, and which codebooks are added in bytes. Private to avx2.cc.
#pragma once

#include "avx2_encode.h"
#include "table_range.h"

namespace lutra {
namespace {

// --- lookup of a tile ----------------------------------------------------------------------------
//
// vpshufb reads 32 rows of a codebook, as bytes v (the value less the least of its codebook and
// output). A byte cannot hold the sum S of many codebooks, and widening every v to 16 bits costs
// three instructions. There are two ways around that; the codebooks of each chunk choose.
//
// Groups: where the ranges of two to four codebooks add up to 255 or less, for all four outputs of
// a block, their bytes are added first. The sum of a group is added to 16-bit sums twice: as it is,
// which makes (sum of the even rows) + 256 (sum of the odd rows), and shifted to the odd rows
// alone. That makes 2.5 instructions for 32 lookups with four to a group, 2.7 with three and 3 with
// two, all in registers. Trained tables have many small ranges, so that nearly all groups have
// four.
//
// Trees: up to 64 bytes are summed twice in bytes: modulo 256 (vpaddb), and approximately, by a
// tree of rounding means (vpavgb). A mean of two is rounded up by half a unit at most, so the root
// A of a tree of n levels has T = 2^n A = S + e with 0 <= e <= n 2^(n-1): at most 192 for 6 levels.
// e is therefore known from its low byte, and S is exact. That makes three instructions for 32
// lookups, and two loads. Tables of more than 16 entries, which take more registers, have no
// groups; there two codebooks whose ranges fit into a byte share a leaf of the tree.
//
// Codebooks come in units of two, so that a narrow sub-tile (16 rows) can read a unit at once, a
// codebook in each lane; it adds the lanes at the end. In a tree a unit is (2u, 2u + 1), in groups
// it is one codebook of each of two groups. Units are summed in chunks of up to 64, whose codes and
// tables stay in the first-level cache for all sub-tiles and some blocks of outputs.
//
// Packed tables: (blocks of 4 outputs, chunks), each a Chunk and its entries:
// [slice of 16 centroids][output][codebook of the unit][16 bytes].

constexpr int32_t kChunkUnits = 64;
constexpr int32_t kMaxEntries = kChunkUnits + kChunkUnits / 4;
constexpr int32_t kLeaves = 64;          // of a tree
constexpr size_t kCachedBytes = 262144;  // tables up to here stay in the second-level cache
constexpr int32_t kBlocksTogether = 4;   // blocks of outputs that use a chunk's codes in turn

constexpr int32_t kLargestGroup = 4;
constexpr int32_t kSmallestGroup = 2;
constexpr int32_t kBookStep = 8;  // what addresses are a multiple of without a shift
constexpr int32_t kGroupSizes = kLargestGroup - kSmallestGroup + 1;

// A chunk of a block is all groups, or a tree of single leaves, or one in which entries 2i and 2i +
// 1 share leaves; then a unit that finds no partner gets an empty one.
enum class Sum : int32_t { kSingle, kPaired, kGroups };

struct Chunk {
  Sum sum;
  int32_t entries;       // of a tree; empty ones fill up to a multiple of 4
  int32_t base[kBlock];  // the first chunk's: the sums of the minima that were subtracted
  union {
    int32_t unit[kMaxEntries];  // of each entry, from the first of the chunk; any for empty ones
    uint16_t book[2 * kMaxEntries];  // times kBookStep: of a group, then of the next one
  };
  int32_t pairs[kGroupSizes];  // of groups of 4, 3 and 2, whose entries follow each other
  int32_t unused[7];           // to 64 bytes
};
static_assert(sizeof(Chunk) % 64 == 0);

LUTRA_INLINE int32_t units_of(int32_t codebooks) { return (codebooks + 1) / 2; }
LUTRA_INLINE int32_t chunks_of(int32_t codebooks) {
  return (units_of(codebooks) + kChunkUnits - 1) / kChunkUnits;
}
LUTRA_INLINE int32_t max_entries(int32_t codebooks) {
  const int32_t units = units_of(codebooks) < kChunkUnits ? units_of(codebooks) : kChunkUnits;
  return round_up(units + units / 4, 4);
}
LUTRA_INLINE int32_t table_slices(const PqShape& s) { return (s.centroids + 15) / 16; }
LUTRA_INLINE int32_t entry_bytes(int32_t slices) { return slices * kBlock * 32; }
LUTRA_INLINE size_t chunk_bytes(int32_t codebooks, int32_t slices) {
  return sizeof(Chunk) + static_cast<size_t>(max_entries(codebooks)) * entry_bytes(slices);
}
LUTRA_INLINE size_t block_bytes(int32_t codebooks, int32_t slices) {
  return chunks_of(codebooks) * chunk_bytes(codebooks, slices);
}

size_t table_bytes(const PqShape& s) {
  return (s.outputs + kBlock - 1) / kBlock * block_bytes(s.codebooks, table_slices(s));
}

struct UnitRange {
  int32_t unit;
  uint8_t range[2 * kBlock];  // of its two codebooks for the outputs of a block
};

LUTRA_INLINE bool fit(const UnitRange& a, const UnitRange& b) {
  for (int32_t i = 0; i < 2 * kBlock; ++i) {
    if (a.range[i] + b.range[i] > 255) return false;
  }
  return true;
}

// The units by their largest range, descending (a counting sort).
void sort_units(const UnitRange* units, int32_t count, UnitRange* sorted) {
  int32_t start[257] = {};
  for (int32_t pass = 0; pass < 2; ++pass) {
    for (int32_t i = 0; i < count; ++i) {
      int32_t largest = 0;
      for (const uint8_t r : units[i].range) largest = r > largest ? r : largest;
      if (pass == 0) {
        ++start[256 - largest];
      } else {
        sorted[start[255 - largest]++] = units[i];
      }
    }
    for (int32_t i = 0; pass == 0 && i < 256; ++i) start[i + 1] += start[i];
  }
}

// Chooses a chunk's entries, -1 for an empty one. The largest range that is left is paired with the
// smallest, if that fits, else with nothing. Measured: a tree costs about as much as two quads (of
// two entries), a paired quad 5/6 of a single one.
void order_units(const UnitRange* sorted, int32_t count, int32_t limit, bool pairs, Chunk* chunk) {
  int32_t n = 0, first = 0, last = count - 1;
  for (; first <= last && n + 2 <= limit; ++first) {
    const bool pair = first < last && fit(sorted[first], sorted[last]);
    chunk->unit[n++] = sorted[first].unit;
    chunk->unit[n++] = pair ? sorted[last--].unit : -1;
  }
  const int32_t quads = (count + 1) / 2;
  const int32_t single = 6 * quads + 12 * ((quads + 15) / 16);
  const int32_t paired = 5 * (n / 2) + 12 * ((n / 2 + 31) / 32) + (n / 2 > 16 ? 4 : 0);
  const bool share = pairs && first > last && paired < single;
  chunk->sum = share ? Sum::kPaired : Sum::kSingle;
  if (!share) {
    for (n = 0; n < count; ++n) chunk->unit[n] = n;
  }
  chunk->entries = n;
  while (n % 4 != 0) chunk->unit[n++] = -1;
}

// --- groups

struct BookRange {
  uint32_t range;  // a byte for each output of a block
  int32_t book;
};

LUTRA_INLINE __m128i bytes_of(uint32_t range) {
  return _mm_cvtsi32_si128(static_cast<int32_t>(range));
}
LUTRA_INLINE bool fits(uint32_t range, __m128i room) {
  return _mm_cvtsi128_si32(_mm_subs_epu8(bytes_of(range), room)) == 0;
}

// The codebooks of a chunk that are in no group yet, the largest range first.
struct Books {
  BookRange left[2 * kChunkUnits];
  int32_t count;

  void take(int32_t i) {
    for (--count; i < count; ++i) left[i] = left[i + 1];
  }
};

// Takes a group of `size` that begins with the largest book left; each further one is the largest
// that leaves room for the smallest ones. False, and nothing taken, if there is none.
bool take_group(Books* books, int32_t size, int32_t* group) {
  int32_t chosen[kLargestGroup] = {0};
  __m128i room = _mm_subs_epu8(_mm_set1_epi8(-1), bytes_of(books->left[0].range));
  for (int32_t n = 1; n < size; ++n) {
    __m128i now = room;
    for (int32_t i = 1; i < size - n; ++i) {
      if (i > books->count) return false;
      now = _mm_subs_epu8(now, bytes_of(books->left[books->count - i].range));
    }
    int32_t at = chosen[n - 1] + 1;
    while (at < books->count && !fits(books->left[at].range, now)) ++at;
    if (at >= books->count || !fits(books->left[at].range, room)) return false;
    chosen[n] = at;
    room = _mm_subs_epu8(room, bytes_of(books->left[at].range));
  }
  for (int32_t n = size; n-- > 0;) {
    group[n] = books->left[chosen[n]].book;
    books->take(chosen[n]);
  }
  return true;
}

// Chooses the groups of a chunk of `count` codebooks; false where a tree is better. An empty
// codebook is number `count`.
bool order_groups(const UnitRange* units, int32_t count, int32_t limit, Chunk* chunk) {
  Books books;
  books.count = 0;
  for (int32_t largest = 255; largest >= 0; --largest) {
    for (int32_t b = 0; b < count; ++b) {
      BookRange book{0, b};
      int32_t most = 0;
      for (int32_t j = 0; j < kBlock; ++j) {
        const uint8_t r = units[b / 2].range[2 * j + b % 2];
        book.range |= static_cast<uint32_t>(r) << 8 * j;
        most = r > most ? r : most;
      }
      if (most == largest) books.left[books.count++] = book;
    }
  }
  int32_t group[kGroupSizes][2 * kChunkUnits][kLargestGroup], groups[kGroupSizes] = {};
  while (books.count > 0) {
    int32_t i = 0;
    while (i < kGroupSizes && !take_group(&books, kLargestGroup - i, group[i][groups[i]])) ++i;
    if (i == kGroupSizes) {
      int32_t* const alone = group[--i][groups[i]];
      alone[0] = books.left[0].book;
      alone[1] = count;
      books.take(0);
    }
    ++groups[i];
  }
  // Groups go in pairs: one without a partner becomes groups of two.
  for (int32_t i = 0; i + 1 < kGroupSizes; ++i) {
    if (groups[i] % 2 == 0) continue;
    const int32_t* const from = group[i][--groups[i]];
    for (int32_t n = 0; n < kLargestGroup - i; n += 2) {
      int32_t* const to = group[kGroupSizes - 1][groups[kGroupSizes - 1]++];
      to[0] = from[n];
      to[1] = n + 1 < kLargestGroup - i ? from[n + 1] : count;
    }
  }
  // In instructions for an output and 32 rows, as counted; those of a tree wait for each other.
  const int32_t quads = (count + 3) / 4;
  const int32_t single = 11 * quads + 24 * ((quads + 15) / 16);
  int32_t entries = 0, cost = 12;
  for (int32_t i = 0; i < kGroupSizes; ++i) {
    const int32_t size = kLargestGroup - i;
    chunk->pairs[i] = (groups[i] + 1) / 2;
    entries += chunk->pairs[i] * size;
    cost += chunk->pairs[i] * 2 * (2 * size + 2);
  }
  if (entries > limit || 2 * cost > 3 * single) return false;
  chunk->sum = Sum::kGroups;
  chunk->entries = entries;
  uint16_t* to = chunk->book;
  for (int32_t i = 0; i < kGroupSizes; ++i) {
    for (int32_t g = 0; g < 2 * chunk->pairs[i]; ++g) {
      for (int32_t n = 0; n < kLargestGroup - i; ++n) {
        *to++ = static_cast<uint16_t>(g < groups[i] ? group[i][g][n] : count);
      }
    }
  }
  return true;
}

// One codebook of one output of an entry.
void pack_entry(const PqShape& s, const int8_t* tables, int32_t b, int32_t m, uint8_t* to) {
  int32_t least, range;
  find_range(s, tables, b, m, &least, &range);
  for (int32_t k = 0; k < 16 * table_slices(s); ++k) {
    const size_t at = (static_cast<size_t>(b) * s.centroids + k) * s.outputs + m;
    const bool there = b < s.codebooks && m < s.outputs && k < s.centroids;
    to[k / 16 * kBlock * 32 + k % 16] = there ? static_cast<uint8_t>(tables[at] - least) : 0;
  }
}

void pack_chunk(const PqShape& s, const int8_t* tables, int32_t block, int32_t first, int32_t* base,
                Chunk* chunk) {
  const int32_t left = units_of(s.codebooks) - first;
  const int32_t count = left < kChunkUnits ? left : kChunkUnits;
  UnitRange units[kChunkUnits], sorted[kChunkUnits];
  for (int32_t u = 0; u < count; ++u) {
    units[u].unit = u;
    for (int32_t i = 0; i < 2 * kBlock; ++i) {
      int32_t least, range;
      find_range(s, tables, 2 * (first + u) + i % 2, block + i / 2, &least, &range);
      base[i / 2] += least;
      units[u].range[i] = static_cast<uint8_t>(range);
    }
  }
  const int32_t books = s.codebooks - 2 * first < 2 * count ? s.codebooks - 2 * first : 2 * count;
  uint8_t* to = reinterpret_cast<uint8_t*>(chunk + 1);
  if (table_slices(s) == 1 && order_groups(units, books, max_entries(s.codebooks), chunk)) {
    uint16_t* book = chunk->book;
    for (int32_t g = 0; g < kGroupSizes; ++g) {
      const int32_t size = kLargestGroup - g;
      for (int32_t p = 0; p < chunk->pairs[g]; ++p, book += 2 * size) {
        for (int32_t n = 0; n < size; ++n, to += entry_bytes(1)) {
          for (int32_t i = 0; i < 2 * kBlock; ++i) {
            const int32_t b = book[i % 2 * size + n];
            pack_entry(s, tables, b < books ? 2 * first + b : s.codebooks, block + i / 2,
                       to + 16 * i);
          }
        }
      }
    }
    for (int32_t i = 0; i < 2 * chunk->entries; ++i) {
      chunk->book[i] =
          static_cast<uint16_t>(chunk->book[i] < books ? chunk->book[i] * kBookStep : 0);
    }
    return;
  }
  sort_units(units, count, sorted);
  order_units(sorted, count, max_entries(s.codebooks), table_slices(s) > 1, chunk);
  for (int32_t entry = 0; entry < round_up(chunk->entries, 4);
       ++entry, to += entry_bytes(table_slices(s))) {
    const bool empty = chunk->unit[entry] < 0;
    const int32_t b = empty ? s.codebooks : 2 * (first + chunk->unit[entry]);
    if (empty) chunk->unit[entry] = 0;
    for (int32_t i = 0; i < 2 * kBlock; ++i) {
      pack_entry(s, tables, b + i % 2, block + i / 2, to + 16 * i);
    }
  }
}

void pack_tables(const PqShape& s, const int8_t* tables, uint8_t* packed) {
  for (int32_t block = 0; block < s.outputs; block += kBlock) {
    int32_t* const base = reinterpret_cast<Chunk*>(packed)->base;
    for (int32_t j = 0; j < kBlock; ++j) base[j] = 0;
    for (int32_t first = 0; first < units_of(s.codebooks); first += kChunkUnits) {
      pack_chunk(s, tables, block, first, base, reinterpret_cast<Chunk*>(packed));
      packed += chunk_bytes(s.codebooks, table_slices(s));
    }
  }
}

}  // namespace
}  // namespace lutra
