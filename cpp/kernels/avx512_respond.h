// Lookup layers. Private to avx512.cc.
//
// Sums are made as those of product quantisation: a register of 64 bytes holds the rows of four
// weights, vpermb reads it at 16 rows x 4 activations, vpdpbusd with ones adds the four. Rows of
// weights are put together on the fly, from a table of the rows of all pairs of weights, and serve
// the 64 rows of a tile.
#pragma once

#include "avx512_dense.h"
#include "responses.h"

namespace lutra {
namespace {

// Gathered indices: [group of 4 codes][block of 16 rows][64 bytes]. Dword i belongs to row i of the
// block, byte j to code j, and holds (code & 15) | j << 4 | (code >> 4) << 6: the index of vpermb
// and vpermi2b. A code is an activation, or of 4 levels entries 8 g + j and 8 g + 4 + j.
int32_t group_entries(const LookupShape& s) { return paired(s) ? 8 : 4; }

// An even number: two groups are read together. What is missing is 0.
int32_t code_groups(const LookupShape& s) { return ceil_div(s.depth, 2 * group_entries(s)) * 2; }

// Packed: parts (1, or 2 if codes are read twice); the rows of pairs of weights [pair][slice][32];
// pairs by output, [block of 16 outputs][group][output][part]; constants; for single rows the table
// in slices of 16 weights and its indices, [block of 16 outputs][4 entries][output][4].
struct Pairs {  // of one part: offsets in the table of rows / 8
  uint16_t first, second;
};

struct ResponseHeader {
  int32_t parts;     // 2 if codes are read twice
  int32_t together;  // 2 if the sums of two bytes fit a byte
};

struct ResponseLayout {
  size_t rows, pairs, constants, row_table, row_index, total;

  ResponseLayout(const LookupShape& s, bool joint) {
    const size_t kinds = static_cast<size_t>(joint ? s.weights * s.weights : s.weights);
    const size_t parts = paired(s) && !joint ? 2 : 1;
    const size_t blocks = static_cast<size_t>(ceil_div(s.outputs, kDenseBlock));
    rows = 64;
    pairs = rows + kinds * kinds * parts * 32 * static_cast<size_t>(row_slices(s));
    constants = pairs + blocks * static_cast<size_t>(code_groups(s)) * parts * 64;
    row_table = constants + blocks * 64;
    row_index = row_table;
    total = row_table;
    if (s.taps != 1) return;
    row_index += static_cast<size_t>(s.levels * weight_slices(s)) * 16;
    total = row_index + blocks * static_cast<size_t>(ceil_div(s.depth, 4)) * 64;
  }

  static int32_t weight_slices(const LookupShape& s) {  // no third without a fourth
    return s.weights <= 16 ? 1 : s.weights <= 32 ? 2 : 4;
  }
};

size_t response_bytes(const LookupShape& s) {
  const size_t apart = ResponseLayout(s, false).total;
  if (!paired(s) || s.weights > kJointWeights) return apart;
  const size_t joint = ResponseLayout(s, true).total;
  return joint > apart ? joint : apart;
}

uint8_t spread_index(int32_t code, int32_t at) {
  return static_cast<uint8_t>((code & 15) | at << 4 | (code >> 4) << 6);
}

void pack_rows(const Responses& r, uint8_t* to) {
  const LookupShape& s = r.shape;
  const bool joint = r.joint();
  const int32_t n = s.weights, kinds = joint ? n * n : n, slices = row_slices(s);
  for (int32_t part = 0; part < (paired(s) && !joint ? 2 : 1); ++part) {
    for (int32_t pair = 0; pair < kinds * kinds; ++pair) {
      for (int32_t i = 0; i < 32 * slices; ++i, ++to) {
        const int32_t kind = i % 32 < 16 ? pair / kinds : pair % kinds;
        const int32_t code = i / 32 * 16 + i % 16;
        *to = joint       ? r.both(kind / n, kind % n, code)
              : paired(s) ? r.part(kind, part, code)
                          : r.single(kind, code);
      }
    }
  }
}

void pack_responses(const LookupShape& s, const int8_t* table, const uint8_t* weight,
                    uint8_t* packed) {
  const Responses r(s, table);
  const bool joint = r.joint();
  const ResponseLayout at(s, joint);
  const int32_t parts = paired(s) && !joint ? 2 : 1, slices = row_slices(s);
  ResponseHeader* const header = reinterpret_cast<ResponseHeader*>(packed);
  header->parts = parts;
  header->together = (joint ? 2 : 1) * r.range <= 127 ? 2 : 1;
  pack_rows(r, packed + at.rows);
  const int32_t n = s.weights, kinds = joint ? n * n : n, groups = code_groups(s);
  const int32_t entries = group_entries(s);
  Pairs* pairs = reinterpret_cast<Pairs*>(packed + at.pairs);
  int32_t* const constants = reinterpret_cast<int32_t*>(packed + at.constants);
  for (int32_t block = 0; block < s.outputs; block += kDenseBlock) {
    for (int32_t i = 0; i < kDenseBlock * groups; ++i) {
      const int32_t g = i / kDenseBlock, m = block + i % kDenseBlock;
      const auto index = [&](int32_t d) -> int32_t {
        const bool there = m < s.outputs && d < s.depth;
        return there ? weight[static_cast<size_t>(m) * s.depth + d] : 0;
      };
      for (int32_t part = 0; part < parts; ++part, ++pairs) {
        int32_t kind[4];
        for (int32_t j = 0; j < 4; ++j) {
          const int32_t d = g * entries + j;
          kind[j] = joint ? index(d) * n + index(d + 4) : index(d + 4 * part);
        }
        const int32_t unit = 4 * slices, base = part * kinds * kinds;
        pairs->first = static_cast<uint16_t>((base + kind[0] * kinds + kind[1]) * unit);
        pairs->second = static_cast<uint16_t>((base + kind[2] * kinds + kind[3]) * unit);
      }
    }
    for (int32_t m = block; m < block + kDenseBlock; ++m) {
      const int32_t missing = groups * entries - s.depth;
      constants[m] =
          m < s.outputs ? r.constant(weight + static_cast<size_t>(m) * s.depth, missing) : 0;
    }
  }
  if (s.taps != 1) return;
  const int32_t row = ResponseLayout::weight_slices(s) * 16;
  for (int32_t i = 0; i < s.levels * row; ++i) {
    const int32_t w = i % row;
    packed[at.row_table + i] = w < n ? static_cast<uint8_t>(table[i / row * n + w]) : uint8_t{0};
  }
  uint8_t* to = packed + at.row_index;
  for (int32_t block = 0; block < s.outputs; block += kDenseBlock) {
    for (int32_t d = 0; d < s.depth; d += 4) {
      for (int32_t i = 0; i < 64; ++i) {
        const int32_t m = block + i / 4, from = d + i % 4;
        const bool there = m < s.outputs && from < s.depth;
        *to++ = spread_index(there ? weight[static_cast<size_t>(m) * s.depth + from] : 0, i % 4);
      }
    }
  }
}

size_t index_bytes(const LookupShape& s) { return static_cast<size_t>(code_groups(s)) * 4 * kRows; }

// Bytes of entries first..first+3 of a row that there are.
__m512i there(int32_t first, int32_t depth) {
  const int32_t count = depth - first;
  return _mm512_set1_epi32(count >= 4   ? -1
                           : count <= 0 ? 0
                                        : static_cast<int32_t>((1u << 8 * count) - 1));
}

void gather_indices(const LookupShape& s, const Patch& p, uint8_t* gathered) {
  Rows rows;
  find_rows(p, rows);
  ByteRows bytes;
  find_byte_rows(p, bytes);
  const int32_t entries = group_entries(s), quads = entries / 4;
  QuadFinder finder(p, s.depth, s.taps, entries, 4, 63 - rows.reach);
  const __m512i places = _mm512_set1_epi32(kBookBits), low = _mm512_set1_epi8(15);
  int32_t groups = code_groups(s);
  for (int32_t d = 0; d < s.depth; d += entries, gathered += rows.blocks * 64, --groups) {
    const uint8_t* planes;
    const Quad* quad;
    finder.next(d / entries, planes, quad);
    __m512i x[4], second[4];
    gather_blocks(planes, quad[0], rows, bytes, x);
    if (quads == 2) gather_blocks(planes, quad[1], rows, bytes, second);
    const __m512i mask = there(d, s.depth), mask2 = there(d + 4, s.depth);
#pragma GCC unroll 4
    for (int32_t i = 0; i < 4; ++i) {
      if (i == rows.blocks) break;
      __m512i v = _mm512_and_si512(x[i], mask);
      if (quads == 2) {
        v = _mm512_or_si512(v, _mm512_slli_epi32(_mm512_and_si512(second[i], mask2), 2));
      } else if (s.levels > 16) {
        const __m512i high = _mm512_slli_epi32(_mm512_andnot_si512(low, v), 2);
        v = _mm512_or_si512(_mm512_and_si512(v, low), high);
      }
      _mm512_storeu_si512(gathered + 64 * i, _mm512_or_si512(v, places));
    }
  }
  for (int32_t i = 0; i < groups * rows.blocks; ++i) _mm512_storeu_si512(gathered + 64 * i, places);
}

// Reads 64 bytes of the rows of four weights.
template <int kSlices>
__m512i read_rows(const __m512i* rows, __m512i index) {
  if constexpr (kSlices == 1) {
    return _mm512_permutexvar_epi8(index, rows[0]);
  } else {
    const __m512i lower = _mm512_permutex2var_epi8(rows[0], index, rows[1]);
    if constexpr (kSlices == 2) return lower;
    const __m512i upper = _mm512_permutex2var_epi8(rows[2], index, rows[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), lower, upper);
  }
}

// The rows of four weights.
template <int kSlices>
void load_rows_of(const uint8_t* rows, const Pairs& pairs, __m512i* to) {
#pragma GCC unroll 4
  for (int32_t i = 0; i < kSlices; ++i) {
    const uint8_t* const first = rows + size_t{8} * pairs.first + 32 * i;
    const uint8_t* const second = rows + size_t{8} * pairs.second + 32 * i;
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
    to[i] = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  }
}

// kCount outputs of all rows. With kTogether == 2, the bytes found in two registers are added
// before vpdpbusd widens them: limited by vpermb then, else by both.
template <int kSlices, int kParts, int kTogether, int kBlocks, int kCount>
void respond_outputs(int32_t groups, const uint8_t* rows, const Pairs* pairs, const uint8_t* x,
                     const int32_t* constants, int32_t m, int32_t count, const Epilogue& e) {
  constexpr int32_t kStep = kParts == 1 ? kTogether : 1;  // groups; else the parts go together
  constexpr int32_t kReads = kStep * kParts;
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum[kCount * kBlocks];
#pragma GCC unroll 16
  for (int32_t i = 0; i < kCount * kBlocks; ++i) {
    sum[i] = _mm512_set1_epi32(constants[i / kBlocks]);
  }
  for (; groups > 0; groups -= kStep) {
    __m512i index[kStep * kBlocks];
#pragma GCC unroll 16
    for (int32_t i = 0; i < kStep * kBlocks; ++i) index[i] = _mm512_loadu_si512(x + 64 * i);
#pragma GCC unroll 16
    for (int32_t o = 0; o < kCount; ++o) {
      __m512i row[kReads * kSlices];
#pragma GCC unroll 2
      for (int32_t i = 0; i < kReads; ++i) {
        const int32_t at = i / kParts * kDenseBlock * kParts + o * kParts + i % kParts;
        load_rows_of<kSlices>(rows, pairs[at], row + i * kSlices);
      }
#pragma GCC unroll 16
      for (int32_t i = 0; i < kBlocks; ++i) {
        __m512i* const to = sum + o * kBlocks + i;
        __m512i found = read_rows<kSlices>(row, index[i]);
        if constexpr (kReads == 2) {
          const __m512i more =
              read_rows<kSlices>(row + kSlices, index[kStep == 2 ? kBlocks + i : i]);
          if constexpr (kTogether == 2) {
            found = _mm512_add_epi8(found, more);
          } else {
            *to = _mm512_dpbusd_epi32(*to, more, ones);
          }
        }
        *to = _mm512_dpbusd_epi32(*to, found, ones);
      }
    }
    pairs += kStep * kDenseBlock * kParts;
    x += kStep * kBlocks * 64;
  }
  __m512i sums[kCount * kBlocks];
#pragma GCC unroll 16
  for (int32_t i = 0; i < kCount * kBlocks; ++i) _mm512_store_si512(sums + i, sum[i]);
  finish<kBlocks>(sums, e, m, count);
}

// kCount must divide the block of 16 packed outputs.
template <int kSlices, int kParts, int kTogether, int kBlocks, int kCount>
void respond_range(const LookupShape& s, const uint8_t* packed, const uint8_t* x, int32_t first,
                   int32_t last, const Epilogue& e) {
  const ResponseLayout at(s, paired(s) && kParts == 1);
  const int32_t groups = code_groups(s);
  const int32_t* const constants = reinterpret_cast<const int32_t*>(packed + at.constants);
  for (int32_t m = first; m < last;) {
    const size_t block = static_cast<size_t>(m / kDenseBlock) * groups * kDenseBlock;
    const Pairs* const pairs =
        reinterpret_cast<const Pairs*>(packed + at.pairs) + (block + m % kDenseBlock) * kParts;
    const int32_t left = last - m;
    if (m % kCount == 0 && left > kCount - kOutputs) {
      respond_outputs<kSlices, kParts, kTogether, kBlocks, kCount>(
          groups, packed + at.rows, pairs, x, constants + m, m, left < kCount ? left : kCount, e);
      m += kCount;
    } else {
      respond_outputs<kSlices, kParts, kTogether, kBlocks, kOutputs>(
          groups, packed + at.rows, pairs, x, constants + m, m, left < kOutputs ? left : kOutputs,
          e);
      m += kOutputs;
    }
  }
}

template <int kSlices, int kParts, int kTogether>
void respond_blocks(const LookupShape& s, const uint8_t* packed, const uint8_t* x, int32_t first,
                    int32_t last, const Epilogue& e) {
  switch (row_blocks(e.rows)) {
    case 1:
      return respond_range<kSlices, kParts, kTogether, 1, 16>(s, packed, x, first, last, e);
    case 2:
      return respond_range<kSlices, kParts, kTogether, 2, 8>(s, packed, x, first, last, e);
    case 3:
      return respond_range<kSlices, kParts, kTogether, 3, 4>(s, packed, x, first, last, e);
    default:
      return respond_range<kSlices, kParts, kTogether, 4, 4>(s, packed, x, first, last, e);
  }
}

void respond(const LookupShape& s, const uint8_t* packed, const uint8_t* gathered, int32_t first,
             int32_t last, const Epilogue& e) {
  const ResponseHeader& h = *reinterpret_cast<const ResponseHeader*>(packed);
  const bool two = h.together == 2;
  auto* run = two ? respond_blocks<1, 1, 2> : respond_blocks<1, 1, 1>;
  if (h.parts == 2) run = two ? respond_blocks<1, 2, 2> : respond_blocks<1, 2, 1>;
  if (row_slices(s) == 2) run = two ? respond_blocks<2, 1, 2> : respond_blocks<2, 1, 1>;
  if (row_slices(s) == 4) run = two ? respond_blocks<4, 1, 2> : respond_blocks<4, 1, 1>;
  run(s, packed, gathered, first, last, e);
}

// --- one row --------------------------------------------------------------------------------
//
// The roles change: the responses of all weights to four activations make the register, and the
// indices are weights, 16 outputs x 4 entries.

// Slice `slice` of the responses to entries 0..count-1 of x, at most four.
__m512i responses_to(const uint8_t* table, size_t row, const uint8_t* x, int32_t count) {
  __m128i part[4];
#pragma GCC unroll 4
  for (int32_t j = 0; j < 4; ++j) {
    const __m128i* const from =
        reinterpret_cast<const __m128i*>(table + (j < count ? x[j] : 0) * row);
    part[j] = j < count ? _mm_loadu_si128(from) : _mm_setzero_si128();
  }
  const __m256i lower = _mm256_inserti128_si256(_mm256_castsi128_si256(part[0]), part[1], 1);
  const __m256i upper = _mm256_inserti128_si256(_mm256_castsi128_si256(part[2]), part[3], 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1);
}

// kVectors blocks of 16 outputs.
template <int kSlices, int kVectors>
void respond_row_outputs(int32_t depth, const uint8_t* table, const uint8_t* index,
                         const uint8_t* x, __m512i* out) {
  const __m512i ones = _mm512_set1_epi8(1);
  const size_t block = static_cast<size_t>(ceil_div(depth, 4)) * 64;
  __m512i sum[kVectors];
#pragma GCC unroll 8
  for (int32_t j = 0; j < kVectors; ++j) sum[j] = _mm512_setzero_si512();
  for (int32_t d = 0; d < depth; d += 4, index += 64) {
    __m512i rows[kSlices];
#pragma GCC unroll 4
    for (int32_t i = 0; i < kSlices; ++i) {
      rows[i] = responses_to(table + 16 * i, kSlices * 16, x + d, depth - d < 4 ? depth - d : 4);
    }
#pragma GCC unroll 8
    for (int32_t j = 0; j < kVectors; ++j) {
      const __m512i at = _mm512_loadu_si512(index + j * block);
      sum[j] = _mm512_dpbusd_epi32(sum[j], ones, read_rows<kSlices>(rows, at));
    }
  }
#pragma GCC unroll 8
  for (int32_t j = 0; j < kVectors; ++j) _mm512_store_si512(out + j, sum[j]);
}

template <int kSlices>
void respond_row_range(const LookupShape& s, const uint8_t* packed, const uint8_t* x, int32_t first,
                       int32_t last, int32_t* sums) {
  const ResponseLayout at(s,
                          paired(s) && reinterpret_cast<const ResponseHeader*>(packed)->parts == 1);
  const size_t bytes = static_cast<size_t>(ceil_div(s.depth, 4)) * 64;
  int32_t block = first / kDenseBlock * kDenseBlock;
  while (block < last) {
    const uint8_t* const index = packed + at.row_index + block / kDenseBlock * bytes;
    const int32_t left = ceil_div(last - block, kDenseBlock);
    const int32_t now = left >= 8 ? 8 : left >= 4 ? 4 : 1;
    auto* const run = now == 8   ? respond_row_outputs<kSlices, 8>
                      : now == 4 ? respond_row_outputs<kSlices, 4>
                                 : respond_row_outputs<kSlices, 1>;
    __m512i out[8];
    run(s.depth, packed + at.row_table, index, x, out);
    for (int32_t j = 0; j < now; ++j, block += kDenseBlock) {
      const int32_t skip = first > block ? first - block : 0, m = block + skip;
      const __mmask16 from = static_cast<__mmask16>(0xffffu << skip);
      const int32_t end = block + kDenseBlock < last ? block + kDenseBlock : last;
      _mm512_mask_storeu_epi32(sums + (m - first), lane_mask(end - m),
                               _mm512_maskz_compress_epi32(from, out[j]));
    }
  }
}

void respond_row(const LookupShape& s, const uint8_t* packed, const uint8_t* x, int32_t first,
                 int32_t last, int32_t* sums) {
  switch (ResponseLayout::weight_slices(s)) {
    case 1:
      return respond_row_range<1>(s, packed, x, first, last, sums);
    case 2:
      return respond_row_range<2>(s, packed, x, first, last, sums);
    default:
      return respond_row_range<4>(s, packed, x, first, last, sums);
  }
}

}  // namespace
}  // namespace lutra
