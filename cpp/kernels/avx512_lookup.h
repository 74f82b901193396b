// Sums of table entries. Private to avx512.cc.
#pragma once

#include "avx512_tables.h"

namespace lutra {
namespace {

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

// Codes of a tile, group by group, where encode() put them.
template <int kBlocks>
struct TileCodes {
  const uint8_t* codes;
  const uint8_t* at(int32_t group, int32_t block) const {
    return codes + (static_cast<size_t>(group) * kBlocks + block) * 64;
  }
};

// Codes in planes of units, where they are.
struct PlaneCodes {
  const CodeTile& tile;
  const uint8_t* at(int32_t group, int32_t block) const {
    return tile.planes + tile.offset[group] + tile.block[block];
  }
};

// 4 kTogether outputs of all rows. One vpermb reads 64 entries; those of a pair of groups are
// added; one vpdpbusd with ones adds the four codebooks of a row. 12 or 16 accumulators hide its
// latency.
template <int kSlices, int kBlocks, int kTogether, class Codes>
void lookup_outputs(const PqShape& s, const uint8_t* tables, const Codes& codes, int32_t m,
                    int32_t count, const Epilogue& e) {
  constexpr int kStep = kSlices * kOutputs * 64;  // bytes of a group
  const __m512i ones = _mm512_set1_epi8(1);
  const size_t block = block_bytes(s);
  const uint8_t* entries = tables + sizeof(TableBlock) + order_bytes(s);
  __m512i sum[kTogether * kOutputs * kBlocks];
  const uint16_t* order[kTogether];
#pragma GCC unroll 4
  for (int32_t t = 0; t < kTogether; ++t) {
    const TableBlock& head = *reinterpret_cast<const TableBlock*>(tables + t * block);
    order[t] = reinterpret_cast<const uint16_t*>(&head + 1);
#pragma GCC unroll 4
    for (int32_t o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 4
      for (int32_t i = 0; i < kBlocks; ++i) {
        sum[(t * kOutputs + o) * kBlocks + i] = _mm512_set1_epi32(head.base[o]);
      }
    }
  }
  const int32_t groups = group_count(s);
  const int32_t paired = 2 * reinterpret_cast<const TableBlock*>(tables)->pairs;
  int32_t c = 0;
  for (; c < paired; c += 2, entries += 2 * kStep) {
#pragma GCC unroll 4
    for (int32_t t = 0; t < kTogether; ++t) {
      __m512i first[kBlocks], second[kBlocks];
#pragma GCC unroll 4
      for (int32_t i = 0; i < kBlocks; ++i) {
        first[i] = _mm512_loadu_si512(codes.at(order[t][c], i));
        second[i] = _mm512_loadu_si512(codes.at(order[t][c + 1], i));
      }
#pragma GCC unroll 4
      for (int32_t o = 0; o < kOutputs; ++o) {
        const uint8_t* const at = entries + t * block + o * 64;
#pragma GCC unroll 4
        for (int32_t i = 0; i < kBlocks; ++i) {
          __m512i& to = sum[(t * kOutputs + o) * kBlocks + i];
          const __m512i v =
              _mm512_add_epi8(read<kSlices>(at, first[i]), read<kSlices>(at + kStep, second[i]));
          to = _mm512_dpbusd_epi32(to, v, ones);
        }
      }
    }
  }
  for (; c < groups; ++c, entries += kStep) {
#pragma GCC unroll 4
    for (int32_t t = 0; t < kTogether; ++t) {
      __m512i index[kBlocks];
#pragma GCC unroll 4
      for (int32_t i = 0; i < kBlocks; ++i) {
        index[i] = _mm512_loadu_si512(codes.at(order[t][c], i));
      }
#pragma GCC unroll 4
      for (int32_t o = 0; o < kOutputs; ++o) {
        const uint8_t* const at = entries + t * block + o * 64;
#pragma GCC unroll 4
        for (int32_t i = 0; i < kBlocks; ++i) {
          __m512i& to = sum[(t * kOutputs + o) * kBlocks + i];
          to = _mm512_dpbusd_epi32(to, read<kSlices>(at, index[i]), ones);
        }
      }
    }
  }
  __m512i sums[kTogether * kOutputs * kBlocks];
#pragma GCC unroll 16
  for (int32_t i = 0; i < kTogether * kOutputs * kBlocks; ++i) {
    _mm512_store_si512(sums + i, sum[i]);
  }
  finish<kBlocks>(sums, e, m, count);
}

// As many outputs at a time as registers allow, then what is left.
template <int kSlices, int kBlocks, int kTogether, class Codes>
void lookup_range(const PqShape& s, const uint8_t* tables, const Codes& codes, int32_t first,
                  int32_t last, const Epilogue& e) {
  constexpr int32_t kStep = kTogether * kOutputs;
  int32_t m = first;
  for (; m + kStep - kOutputs < last; m += kStep) {
    const int32_t count = last - m < kStep ? last - m : kStep;
    lookup_outputs<kSlices, kBlocks, kTogether>(s, tables + m / kOutputs * block_bytes(s), codes, m,
                                                count, e);
  }
  if constexpr (kTogether > 1) {
    if (m < last) lookup_range<kSlices, kBlocks, kTogether / 2>(s, tables, codes, m, last, e);
  }
}

// with_codes(kBlocks): the codes of a tile of so many blocks.
template <int kSlices, class WithCodes>
void lookup_blocks(const PqShape& s, const uint8_t* tables, int32_t first, int32_t last,
                   const Epilogue& e, const WithCodes& with_codes) {
  switch (row_blocks(e.rows)) {
    case 1:
      return lookup_range<kSlices, 1, 4>(s, tables, with_codes.template of<1>(), first, last, e);
    case 2:
      return lookup_range<kSlices, 2, 2>(s, tables, with_codes.template of<2>(), first, last, e);
    case 3:
      return lookup_range<kSlices, 3, 1>(s, tables, with_codes.template of<3>(), first, last, e);
    default:
      return lookup_range<kSlices, 4, 1>(s, tables, with_codes.template of<4>(), first, last, e);
  }
}

template <class WithCodes>
void lookup_codes(const PqShape& s, const uint8_t* tables, int32_t first, int32_t last,
                  const Epilogue& e, const WithCodes& with_codes) {
  switch (table_slices(s)) {
    case 1:
      return lookup_blocks<1>(s, tables, first, last, e, with_codes);
    case 2:
      return lookup_blocks<2>(s, tables, first, last, e, with_codes);
    default:
      return lookup_blocks<4>(s, tables, first, last, e, with_codes);
  }
}

struct OfTile {
  const uint8_t* codes;
  template <int kBlocks>
  TileCodes<kBlocks> of() const {
    return {codes};
  }
};

struct OfPlanes {
  const CodeTile& tile;
  template <int kBlocks>
  PlaneCodes of() const {
    return {tile};
  }
};

void lookup(const PqShape& s, const uint8_t* tables, const uint8_t* codes, int32_t first,
            int32_t last, const Epilogue& e) {
  lookup_codes(s, tables, first, last, e, OfTile{codes});
}

bool reads_units(const PqShape& s) { return code_unit(s) == kBooks; }

void lookup_units(const PqShape& s, const uint8_t* tables, const CodeTile& codes, int32_t first,
                  int32_t last, const Epilogue& e) {
  lookup_codes(s, tables, first, last, e, OfPlanes{codes});
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
