// AVX2: sums of table values by code. Private to avx2.cc.
#pragma once

#include "avx2_tables.h"

namespace lutra {
namespace {

// Where the codes of the codebooks of a chunk are, for a sub-tile. `book` is times kBookStep.
struct TileReads {  // encode()'s order
  const uint8_t* codes;
  LUTRA_INLINE __m256i whole(size_t book) const {
    return load(codes + book * (kSubRows / kBookStep));
  }
  LUTRA_INLINE __m128i half(size_t book) const {
    return load_half(codes + book * (kRowBlock / kBookStep));
  }
  LUTRA_INLINE __m256i unit(size_t unit) const { return load(codes + unit * 2 * kRowBlock); }
};

struct PlaneReads {  // planes of codes
  const uint8_t* codes;
  const int64_t* offset;
  LUTRA_INLINE const uint8_t* at(size_t book) const {
    static_assert(sizeof(int64_t) == kBookStep);
    int64_t to;
    __builtin_memcpy(&to, reinterpret_cast<const uint8_t*>(offset) + book, sizeof to);
    return codes + to;
  }
  LUTRA_INLINE __m256i whole(size_t book) const { return load(at(book)); }
  LUTRA_INLINE __m128i half(size_t book) const { return load_half(at(book)); }
  LUTRA_INLINE __m256i unit(size_t unit) const {
    return join(half(2 * unit * kBookStep), half((2 * unit + 1) * kBookStep));
  }
};

struct SplitReads : PlaneReads {  // whose second 16 rows are elsewhere
  int64_t second;
  LUTRA_INLINE __m256i whole(size_t book) const {
    const uint8_t* const first = at(book);
    return join(load_half(first), load_half(first + second));
  }
};

// Four reads of a quad, those that may share a leaf side by side: two entries (wide), or four.
template <bool kNarrow>
struct Quad {
  static constexpr int32_t kEntries = kNarrow ? 4 : 2;
  template <class Reads>
  LUTRA_INLINE static __m256i codes(const Reads& codes, const int32_t* order, int32_t i) {
    if constexpr (kNarrow) return codes.unit(static_cast<size_t>(order[i]));
    return codes.whole(static_cast<size_t>(2 * order[i % 2] + i / 2) * kBookStep);
  }
  LUTRA_INLINE static __m256i table(const uint8_t* entries, int32_t entry_bytes, int32_t i) {
    return kNarrow ? load(entries + i * entry_bytes)
                   : broadcast_half(entries + i % 2 * entry_bytes + i / 2 * 16);
  }
};

template <int kSlices, bool kNarrow>
LUTRA_INLINE __m256i read(const uint8_t* entries, int32_t i, int32_t j, const __m256i* index) {
  __m256i v = _mm256_setzero_si256();
  for (int32_t slice = 0; slice < kSlices; ++slice) {
    const uint8_t* const at = entries + (slice * kBlock + j) * 32;
    const __m256i table = Quad<kNarrow>::table(at, kSlices * kBlock * 32, i);
    const __m256i part = _mm256_shuffle_epi8(table, index[slice]);
    v = slice == 0 ? part : _mm256_or_si256(v, part);
  }
  return v;
}

// The codes of a read, less the first entry of each slice; bit 7 is set, and so zero comes out of
// vpshufb, outside its own slice.
template <int kSlices>
LUTRA_INLINE void slice_codes(__m256i code, __m256i* index) {
  index[0] = code;
  for (int32_t i = 0; kSlices > 1 && i < kSlices; ++i) {
    const __m256i first = _mm256_set1_epi8(static_cast<char>(16 * i));
    index[i] = _mm256_adds_epu8(_mm256_sub_epi8(code, first), _mm256_set1_epi8(0x70));
  }
}

// A quad for the four outputs of a block: sum[j] += its values, mean[j] = the mean of its leaves.
// Output by output, while there are registers for all indices.
template <int kSlices, bool kNarrow, bool kPaired, class Reads>
LUTRA_INLINE void quad(const uint8_t* entries, const int32_t* order, const Reads& codes,
                       __m256i* sum, __m256i* mean) {
  __m256i index[4][kSlices], v[kBlock][4];
  for (int32_t i = 0; i < 4; ++i) {
    slice_codes<kSlices>(Quad<kNarrow>::codes(codes, order, i), index[i]);
    for (int32_t j = 0; kSlices > 2 && j < kBlock; ++j) {
      v[j][i] = read<kSlices, kNarrow>(entries, i, j, index[i]);
      keep(v[j][i]);
    }
  }
  for (int32_t j = 0; j < kBlock; ++j) {
    for (int32_t i = 0; kSlices <= 2 && i < 4; ++i) {
      v[j][i] = read<kSlices, kNarrow>(entries, i, j, index[i]);
    }
    const __m256i v01 = _mm256_add_epi8(v[j][0], v[j][1]);
    const __m256i v23 = _mm256_add_epi8(v[j][2], v[j][3]);
    sum[j] = _mm256_add_epi8(sum[j], _mm256_add_epi8(v01, v23));
    mean[j] = kPaired ? _mm256_avg_epu8(v01, v23)
                      : _mm256_avg_epu8(_mm256_avg_epu8(v[j][0], v[j][1]),
                                        _mm256_avg_epu8(v[j][2], v[j][3]));
  }
}

using Node = __m256i[kBlock];

template <int kNodes>
LUTRA_INLINE __m256i root(const Node* node, int32_t j) {
  if constexpr (kNodes == 1) {
    return node[0][j];
  } else {
    return _mm256_avg_epu8(root<kNodes / 2>(node, j), root<kNodes / 2>(node + kNodes / 2, j));
  }
}

using Total = __m256i[4];  // of an output, rows 0..7, 8..15, 16..23, 24..31

template <bool kFirst>
LUTRA_INLINE void add_words(__m128i words, __m256i* total) {
  const __m256i v = _mm256_cvtepu16_epi32(words);
  *total = kFirst ? v : _mm256_add_epi32(*total, v);
}

// Sums in 16 bits, of rows 0..7, 16..23 and of 8..15, 24..31.
template <bool kFirst>
LUTRA_INLINE void add_rows16(__m256i low, __m256i high, Total& total) {
  add_words<kFirst>(_mm256_castsi256_si128(low), &total[0]);
  add_words<kFirst>(_mm256_castsi256_si128(high), &total[1]);
  add_words<kFirst>(_mm256_extracti128_si256(low, 1), &total[2]);
  add_words<kFirst>(_mm256_extracti128_si256(high, 1), &total[3]);
}

// total[j] += the exact sums, or = if they are the first. The low byte of S is known, and T - S <
// 256: its high byte is that of T, less 1 if the low byte of T is below that of S.
template <int kNodes, int kLevels, bool kFirst>
LUTRA_INLINE void resolve(const Node* node, const __m256i* sum, Total* total) {
  const __m256i high_bits = _mm256_set1_epi8(static_cast<char>(0xff << kLevels));
  const __m256i minus_one = _mm256_set1_epi8(-1);
  for (int32_t j = 0; j < kBlock; ++j) {
    const __m256i a = root<kNodes>(node, j), s = sum[j];
    const __m256i low = _mm256_and_si256(_mm256_slli_epi16(a, kLevels), high_bits);
    const __m256i high = _mm256_andnot_si256(high_bits, _mm256_srli_epi16(a, 8 - kLevels));
    const __m256i enough = _mm256_cmpeq_epi8(_mm256_max_epu8(low, s), low);  // no borrow
    const __m256i exact = _mm256_sub_epi8(_mm256_add_epi8(high, minus_one), enough);
    add_rows16<kFirst>(_mm256_unpacklo_epi8(s, exact), _mm256_unpackhi_epi8(s, exact), total[j]);
  }
}

template <int kNodes, int kLevels>
[[gnu::noinline]] void resolve(const Node* node, const __m256i* sum, bool first, Total* total) {
  if (first) {
    resolve<kNodes, kLevels, true>(node, sum, total);
  } else {
    resolve<kNodes, kLevels, false>(node, sum, total);
  }
}

// Adds the sums of at most kLeaves leaves to total[j]. The quads' means go through memory: there
// are no registers for them. Not inline, so that the loop has all registers. `ahead`, if not null,
// is where the tables that come next begin: large ones are streamed from the last-level cache or
// from memory, chunk by chunk of 8 KB, and the hardware's prefetchers end with every page.
template <int kSlices, bool kNarrow, bool kPaired, class Reads>
[[gnu::noinline]] void tree(const uint8_t* entries, const int32_t* order, const Reads& codes,
                            int32_t quads, const uint8_t* ahead, bool first, Total* total) {
  constexpr int kBelow = kPaired ? 1 : 2;  // levels inside a quad
  const __m256i zero = _mm256_setzero_si256();
  Node node[kLeaves / 2], sum = {zero, zero, zero, zero};
  int32_t nodes = 0;
  for (; nodes < quads; ++nodes) {
    constexpr int32_t kBytes = Quad<kNarrow>::kEntries * kSlices * kBlock * 32;
    if (ahead) {
      for (int32_t i = 0; i < kBytes; i += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead + i), _MM_HINT_T0);
      }
      ahead += kBytes;
    }
    quad<kSlices, kNarrow, kPaired>(entries, order, codes, sum, node[nodes]);
    entries += kBytes;
    order += Quad<kNarrow>::kEntries;
  }
  for (; nodes & (nodes - 1); ++nodes) {
    for (int32_t j = 0; j < kBlock; ++j) store(&node[nodes][j], zero);
  }
  switch (nodes) {
    case 1:
      return resolve<1, kBelow>(node, sum, first, total);
    case 2:
      return resolve<2, kBelow + 1>(node, sum, first, total);
    case 4:
      return resolve<4, kBelow + 2>(node, sum, first, total);
    case 8:
      return resolve<8, kBelow + 3>(node, sum, first, total);
    case 16:
      return resolve<16, kBelow + 4>(node, sum, first, total);
    default:
      return resolve<32, 6>(node, sum, first, total);  // paired
  }
}

// The sums of groups for an output and 32 rows. Not an array of them: GCC would keep it in memory.
struct GroupSum {
  __m256i all = _mm256_setzero_si256(), odd = all;

  template <int kSize, bool kNarrow>
  LUTRA_INLINE void add(const uint8_t* entries, const __m256i* index) {
    const auto part = [&](int32_t i) {
      const uint8_t* const at = entries + i * kBlock * 32;
      return _mm256_shuffle_epi8(kNarrow ? load(at) : broadcast_half(at), index[i]);
    };
    __m256i sum = _mm256_add_epi8(part(0), part(1));
    if constexpr (kSize == 3) sum = _mm256_add_epi8(sum, part(2));
    if constexpr (kSize == 4) sum = _mm256_add_epi8(sum, _mm256_add_epi8(part(2), part(3)));
    all = _mm256_add_epi16(all, sum);
    odd = _mm256_add_epi16(odd, _mm256_srli_epi16(sum, 8));
    keep(all);
    keep(odd);
  }

  // At most 128 groups: no sum of rows overflows but that of all, whose odd ones are known.
  LUTRA_INLINE void resolve(bool first, Total& total) const {
    const __m256i even = _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8));
    const __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
    first ? add_rows16<true>(low, high, total) : add_rows16<false>(low, high, total);
  }
};

struct BlockSums {
  GroupSum s0, s1, s2, s3;

  template <int kSize, bool kNarrow>
  LUTRA_INLINE void add(const uint8_t* entries, const __m256i* index) {
    static_assert(kBlock == 4);
    s0.add<kSize, kNarrow>(entries, index);
    s1.add<kSize, kNarrow>(entries + 32, index);
    s2.add<kSize, kNarrow>(entries + 64, index);
    s3.add<kSize, kNarrow>(entries + 96, index);
  }
};

// Pairs of groups, for the four outputs of a block.
template <int kSize, bool kNarrow, class Reads>
LUTRA_INLINE void group_pairs(int32_t pairs, const uint8_t*& entries, const uint16_t*& order,
                              const Reads& codes, const uint8_t*& ahead, BlockSums& sums) {
  constexpr int32_t kBytes = kSize * kBlock * 32;
  for (; pairs > 0; --pairs, entries += kBytes, order += 2 * kSize) {
    if (ahead) {
      for (int32_t i = 0; i < kBytes; i += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead + i), _MM_HINT_T0);
      }
      ahead += kBytes;
    }
    const auto both = [&](int32_t i) {
      return join(codes.half(order[i]), codes.half(order[kSize + i]));
    };
    const auto one = [&](int32_t i) { return codes.whole(order[i]); };
    constexpr int32_t kLast = kSize - 1;
    if constexpr (kNarrow) {
      const __m256i index[4] = {both(0), both(1), both(kSize > 2 ? 2 : 0), both(kLast)};
      sums.add<kSize, true>(entries, index);
    } else {
      const __m256i first[4] = {one(0), one(1), one(kSize > 2 ? 2 : 0), one(kLast)};
      sums.add<kSize, false>(entries, first);
      constexpr int32_t k = kSize;
      const __m256i second[4] = {one(k), one(k + 1), one(kSize > 2 ? k + 2 : k), one(k + kLast)};
      sums.add<kSize, false>(entries + 16, second);
    }
  }
}

template <bool kNarrow, class Reads>
[[gnu::noinline]] void add_groups(const Chunk& chunk, const Reads& codes, const uint8_t* ahead,
                                  bool first, Total* total) {
  const Reads from = codes;
  BlockSums sums;
  const uint8_t* entries = reinterpret_cast<const uint8_t*>(&chunk + 1);
  const uint16_t* order = chunk.book;
  group_pairs<4, kNarrow>(chunk.pairs[0], entries, order, from, ahead, sums);
  group_pairs<3, kNarrow>(chunk.pairs[1], entries, order, from, ahead, sums);
  group_pairs<2, kNarrow>(chunk.pairs[2], entries, order, from, ahead, sums);
  sums.s0.resolve(first, total[0]);
  sums.s1.resolve(first, total[1]);
  sums.s2.resolve(first, total[2]);
  sums.s3.resolve(first, total[3]);
}

// Adds the sums of a chunk to total[j], after the first ones.
template <int kSlices, bool kNarrow, class Reads>
LUTRA_INLINE void add_chunk(const Chunk& chunk, const Reads& codes, const uint8_t* later,
                            bool first, Total* total) {
  const uint8_t* const entries = reinterpret_cast<const uint8_t*>(&chunk + 1);
  if constexpr (kSlices == 1) {
    if (chunk.sum == Sum::kGroups) {
      return add_groups<kNarrow>(chunk, codes, later ? later + sizeof(Chunk) : nullptr, first,
                                 total);
    }
  }
  auto* run = tree<kSlices, kNarrow, false, Reads>;
  if constexpr (kSlices > 1) {
    if (chunk.sum == Sum::kPaired) run = tree<kSlices, kNarrow, true, Reads>;
  }
  const int32_t most = chunk.sum == Sum::kPaired ? kLeaves / 2 : kLeaves / 4;
  const int32_t each = Quad<kNarrow>::kEntries;
  const int32_t quads = (chunk.entries + each - 1) / each;
  for (int32_t q = 0; q < quads; q += most) {
    const int32_t entry = q * each;
    run(entries + entry * entry_bytes(kSlices), chunk.unit + entry, codes,
        quads - q < most ? quads - q : most,
        later ? later + sizeof(Chunk) + entry * entry_bytes(kSlices) : nullptr, first && q == 0,
        total);
  }
}

template <bool kValue>
struct Constant {
  constexpr bool operator()() const { return kValue; }
};

// with(row, narrow, book, body): body(is it narrow?, reads of the codebooks from `book` on) for the
// sub-tile that begins with the row.
struct TileSource {
  const uint8_t* codes;
  int32_t codebooks;  // padded
  template <class Body>
  LUTRA_INLINE void with(int32_t row, bool narrow, int32_t book, const Body& body) const {
    const uint8_t* const from = codes + static_cast<size_t>(codebooks) * row;
    if (narrow) {
      body(Constant<true>(), TileReads{from + book * kRowBlock});
    } else {
      body(Constant<false>(), TileReads{from + book * kSubRows});
    }
  }
};

struct PlaneSource {
  const CodeTile& tile;
  template <class Body>
  LUTRA_INLINE void with(int32_t row, bool narrow, int32_t book, const Body& body) const {
    const int32_t* const block = tile.block + row / kRowBlock;
    const PlaneReads reads{tile.planes + block[0], tile.offset + book};
    if (narrow) {
      body(Constant<true>(), reads);
    } else if (block[1] - block[0] == kRowBlock) {
      body(Constant<false>(), reads);
    } else {
      body(Constant<false>(), SplitReads{reads, block[1] - block[0]});
    }
  }
};

// Outputs m.. of some blocks, all sub-tiles.
template <int kSlices, class Source>
void lookup_blocks(const PqShape& s, const uint8_t* tables, const Source& source, int32_t m,
                   int32_t last, const Finish& finish) {
  const size_t block_size = block_bytes(s.codebooks, kSlices);
  const size_t chunk_size = chunk_bytes(s.codebooks, kSlices);
  const int32_t chunks = chunks_of(s.codebooks), rows = finish.e.rows;
  const bool large = table_bytes(s) > kCachedBytes;
  const int32_t blocks = (last - m + kBlock - 1) / kBlock;
  Total total[kBlocksTogether][kRows / kSubRows][kBlock];
  for (int32_t c = 0; c < chunks; ++c) {
    for (int32_t i = 0; i < blocks; ++i) {
      const uint8_t* const at = tables + i * block_size + c * chunk_size;
      const uint8_t* const after = i + 1 < blocks   ? at + block_size
                                   : c + 1 < chunks ? tables + (c + 1) * chunk_size
                                                    : tables + blocks * block_size;
      const Chunk& chunk =
          *reinterpret_cast<const Chunk*>(tables + i * block_size + c * chunk_size);
      for (int32_t row = 0; row < rows; row += kSubRows) {
        const uint8_t* const later = large && row == 0 ? after : nullptr;
        Total* const to = total[i][row / kSubRows];
        source.with(row, narrow(rows - row), 2 * c * kChunkUnits, [&](auto is_narrow, auto codes) {
          add_chunk<kSlices, is_narrow()>(chunk, codes, later, c == 0, to);
        });
      }
    }
  }
  for (int32_t i = 0; m + i < last; ++i) {
    const uint8_t* const block = tables + i / kBlock * block_size;
    const int32_t base = reinterpret_cast<const Chunk*>(block)->base[i % kBlock];
    for (int32_t row = 0; row < rows; row += kSubRows) {
      const Total& t = total[i / kBlock][row / kSubRows][i % kBlock];
      if (narrow(rows - row)) {
        const __m256i sums[2] = {_mm256_add_epi32(t[0], t[2]), _mm256_add_epi32(t[1], t[3])};
        finish.sums<2>(m + i, row, base, sums);
      } else {
        finish.sums<4>(m + i, row, base, t);
      }
    }
  }
}

template <int kSlices, class Source>
void lookup_slices(const PqShape& s, const uint8_t* tables, const Source& source, int32_t first,
                   int32_t last, const Epilogue& e) {
  const Finish finish(e);
  constexpr int32_t kTogether = kBlocksTogether * kBlock;
  for (int32_t m = first; m < last; m += kTogether) {
    lookup_blocks<kSlices>(s, tables + m / kBlock * block_bytes(s.codebooks, kSlices), source, m,
                           last - m < kTogether ? last : m + kTogether, finish);
  }
}

void lookup(const PqShape& s, const uint8_t* tables, const uint8_t* codes, int32_t first,
            int32_t last, const Epilogue& e) {
  const TileSource source{codes, padded_codebooks(s)};
  switch (table_slices(s)) {
    case 1:
      return lookup_slices<1>(s, tables, source, first, last, e);
    case 2:
      return lookup_slices<2>(s, tables, source, first, last, e);
    default:
      return lookup_slices<4>(s, tables, source, first, last, e);
  }
}

bool reads_units(const PqShape& s) { return table_slices(s) == 1; }

void lookup_units(const PqShape& s, const uint8_t* tables, const CodeTile& codes, int32_t first,
                  int32_t last, const Epilogue& e) {
  lookup_slices<1>(s, tables, PlaneSource{codes}, first, last, e);
}

// --- one row -------------------------------------------------------------------------------------
//
// Bound by memory: each code selects a row of M bytes, mostly in a page of its own, which hardware
// prefetchers do not follow. Eight codebooks are walked together, outputs in the lanes, and the
// rows of later codebooks are prefetched meanwhile.

constexpr int32_t kRowBooks = 8;
constexpr int32_t kRowAhead = 16384;  // bytes of rows to be under way, at least

// sums[0..31] += rows[0..7][at..at+31]: bytes of two codebooks side by side, added by vpmaddubsw.
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
  const size_t codebook = static_cast<size_t>(s.centroids) * s.outputs;
  for (int32_t m = 0; m < count; ++m) sums[m] = 0;
  tables += first;
  const int32_t groups_ahead = 1 + kRowAhead / (kRowBooks * (count + 64));
  int32_t b = 0;
  for (; b + kRowBooks <= s.codebooks; b += kRowBooks) {
    const int8_t *rows[kRowBooks], *later[kRowBooks];
    for (int32_t i = 0; i < kRowBooks; ++i) {
      const int32_t ahead = b + i + groups_ahead * kRowBooks;
      const int32_t next = ahead < s.codebooks ? ahead : b + i;
      rows[i] = tables + (b + i) * codebook + static_cast<size_t>(codes[b + i]) * s.outputs;
      later[i] = tables + next * codebook + static_cast<size_t>(codes[next]) * s.outputs;
    }
    int32_t m = 0;
    for (; m + 32 <= count; m += 32) {
      if (m % 64 == 0) {
        for (const int8_t* row : later) {
          _mm_prefetch(reinterpret_cast<const char*>(row + m), _MM_HINT_T0);
        }
      }
      add_rows(rows, m, sums + m);
    }
    for (; m < count; ++m) {
      for (const int8_t* row : rows) sums[m] += row[m];
    }
  }
  for (; b < s.codebooks; ++b) {
    const int8_t* const row = tables + b * codebook + static_cast<size_t>(codes[b]) * s.outputs;
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
