// AVX2: lookup layers. Private to avx2.cc.
//
// vpshufb reads the row of a weight, the same in both lanes, at the activation indices of 32 rows
// of the tile. The bytes that it finds are unsigned. As many of them as cannot overflow are added
// as bytes, a "group"; then they are widened without being unpacked: the 16-bit lanes of `sum` add
// them as they are, low byte + 256 * high byte, those of `high` add the high bytes, and in the end
// low bytes = sum - 256 * high. That holds for 257 times 255.
#pragma once

#include "avx2_common.h"
#include "responses.h"

namespace lutra {
namespace {

constexpr int32_t kWidenings = 257;   // 257 * 255 = 2^16 - 1
constexpr int32_t kCodeUnit = 8;      // codes of a tile are padded to a multiple of this
constexpr int32_t kTogether = 2;      // outputs that share loads of indices
constexpr int32_t kLineOutputs = 32;  // outputs per block of weight indices for single rows

LUTRA_INLINE int32_t codes_of(const LookupShape& s) {
  return paired(s) ? (s.depth + 1) / 2 : s.depth;
}

// Gathered indices: [32 rows][code][slice][row]. A code is an activation, or of 4 levels entries
// 2 i and 2 i + 1. In a slice of 16 levels bit 7 is set, for which vpshufb finds 0, where the
// activation lies in another slice. Codes that are missing are 0.
LUTRA_INLINE size_t sub_tile_bytes(const LookupShape& s) {
  return static_cast<size_t>(round_up(codes_of(s), kCodeUnit)) * row_slices(s) * kSubRows;
}

size_t index_bytes(const LookupShape& s) { return sub_tile_bytes(s) * (kRows / kSubRows); }

LUTRA_INLINE int32_t weight_slices(const LookupShape& s) { return (s.weights + 15) / 16; }

// Packed: these, then rows [part][weight or pair][slice][16], constants by output, rows of weights
// [2 outputs][code][output][part] as bytes, and for single rows the table in slices of 16 weights,
// the minima of its rows, and weight indices [32 outputs][entry][output].
struct ResponseHeader {
  int32_t parts, group;
  size_t rows, constants, weights, row_table, row_low, row_index, total;

  ResponseHeader(const LookupShape& s, bool joint) {
    parts = paired(s) && !joint ? 2 : 1;
    group = 1;
    const size_t outputs = static_cast<size_t>(round_up(s.outputs, kTogether));
    const size_t kinds = static_cast<size_t>(joint ? s.weights * s.weights : s.weights * parts);
    rows = 64;
    constants = rows + kinds * static_cast<size_t>(row_slices(s)) * 16;
    weights = constants + outputs * sizeof(int32_t);
    const size_t codes = static_cast<size_t>(round_up(codes_of(s), kCodeUnit));
    row_table = weights + outputs * codes * static_cast<size_t>(parts);
    row_low = row_index = total = row_table;
    if (s.taps != 1) return;
    row_low += static_cast<size_t>(s.levels * weight_slices(s)) * 16;
    row_index = row_low + static_cast<size_t>(s.levels) * sizeof(int32_t);
    total = row_index + static_cast<size_t>(round_up(s.outputs, kLineOutputs)) * s.depth;
  }
};

size_t response_bytes(const LookupShape& s) {
  const size_t apart = ResponseHeader(s, false).total;
  if (!paired(s) || s.weights > kJointWeights) return apart;
  const size_t joint = ResponseHeader(s, true).total;
  return joint > apart ? joint : apart;
}

// A weight is the offset of its row / 8, which a load multiplies by itself, wherever it fits a
// byte.
LUTRA_INLINE constexpr int32_t row_unit(int32_t slices) { return slices == 4 ? 16 : 8; }

void pack_row_order(const LookupShape& s, const ResponseHeader& h, const int8_t* table,
                    const uint8_t* weight, uint8_t* packed) {
  const int32_t row = weight_slices(s) * 16;
  int32_t* const lows = reinterpret_cast<int32_t*>(packed + h.row_low);
  for (int32_t i = 0; i < s.levels; ++i) {
    const int8_t* const from = table + i * s.weights;
    int32_t low = from[0];
    for (int32_t w = 1; w < s.weights; ++w) low = from[w] < low ? from[w] : low;
    lows[i] = low;
    for (int32_t w = 0; w < row; ++w) {
      packed[h.row_table + i * row + w] =
          w < s.weights ? static_cast<uint8_t>(from[w] - low) : uint8_t{0};
    }
  }
  uint8_t* to = packed + h.row_index;
  for (int32_t block = 0; block < s.outputs; block += kLineOutputs) {
    for (int32_t d = 0; d < s.depth; ++d) {
      for (int32_t m = block; m < block + kLineOutputs; ++m) {
        *to++ = m < s.outputs ? weight[static_cast<size_t>(m) * s.depth + d] : uint8_t{0};
      }
    }
  }
}

void pack_responses(const LookupShape& s, const int8_t* table, const uint8_t* weight,
                    uint8_t* packed) {
  const Responses r(s, table);
  const bool joint = r.joint();
  ResponseHeader h(s, joint);
  const int32_t most = r.range == 0 ? 255 : 255 / (joint ? 2 * r.range : r.range);
  h.group = most >= 8 && h.parts == 1 && row_slices(s) == 1 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1;
  *reinterpret_cast<ResponseHeader*>(packed) = h;
  const int32_t n = s.weights, slices = row_slices(s);
  uint8_t* to = packed + h.rows;
  for (int32_t kind = 0; kind < (joint ? n * n : n * h.parts); ++kind) {
    for (int32_t i = 0; i < 16 * slices; ++i) {
      *to++ = joint       ? r.both(kind / n, kind % n, i)
              : paired(s) ? r.part(kind % n, kind / n, i)
                          : r.single(kind, i);
    }
  }
  int32_t* const constants = reinterpret_cast<int32_t*>(packed + h.constants);
  const int32_t codes = round_up(codes_of(s), kCodeUnit), entries = paired(s) ? 2 : 1;
  // respond() reads as many codes as make whole groups
  const int32_t step = h.group > h.parts ? h.group / h.parts : 1;
  const int32_t missing = round_up(codes_of(s), step) * entries - s.depth;
  const int32_t unit = 16 * slices / row_unit(slices);
  to = packed + h.weights;
  for (int32_t block = 0; block < s.outputs; block += kTogether) {
    for (int32_t m = block; m < block + kTogether; ++m) {
      constants[m] =
          m < s.outputs ? r.constant(weight + static_cast<size_t>(m) * s.depth, missing) : 0;
    }
    for (int32_t i = 0; i < codes * kTogether; ++i) {
      const int32_t m = block + i % kTogether, d = i / kTogether * entries;
      const auto index = [&](int32_t at) -> int32_t {
        const bool there = m < s.outputs && at < s.depth;
        return there ? weight[static_cast<size_t>(m) * s.depth + at] : 0;
      };
      if (joint) {
        *to++ = static_cast<uint8_t>((index(d) * n + index(d + 1)) * unit);
        continue;
      }
      for (int32_t part = 0; part < h.parts; ++part) {
        *to++ = static_cast<uint8_t>((part * n + index(d + part)) * unit);
      }
    }
  }
  if (s.taps == 1) pack_row_order(s, h, table, weight, packed);
}

template <typename Loader>
LUTRA_INLINE void gather_codes(const LookupShape& s, const Patch& p, const Loader& rows,
                               uint8_t* to) {
  Entries walk(p, s.taps, 0);
  const int32_t slices = row_slices(s), codes = codes_of(s);
  for (int32_t i = 0; i < codes; ++i, to += slices * kSubRows) {
    __m256i x = rows.wide(walk.next());
    if (paired(s)) {
      if (2 * i + 1 < s.depth) {
        x = _mm256_or_si256(x, _mm256_slli_epi16(rows.wide(walk.next()), 2));
      }
      store(to, x);
    } else if (slices == 1) {
      store(to, x);
    } else {
      for (int32_t slice = 0; slice < slices; ++slice) {
        const __m256i from = _mm256_sub_epi8(x, _mm256_set1_epi8(static_cast<char>(16 * slice)));
        store(to + slice * kSubRows, _mm256_adds_epu8(from, _mm256_set1_epi8(0x70)));
      }
    }
  }
  for (int32_t i = codes; i < round_up(codes, kCodeUnit); ++i) {
    for (int32_t slice = 0; slice < slices; ++slice, to += kSubRows) {
      store(to, _mm256_set1_epi8(slice == 0 ? 0 : -128));
    }
  }
}

void gather_indices(const LookupShape& s, const Patch& p, uint8_t* gathered) {
  for (int32_t row = 0; row < p.rows; row += kSubRows, gathered += sub_tile_bytes(s)) {
    Rows rows;
    find_rows(p, row, &rows);
    with_rows(rows, [&](const auto& loader) { gather_codes(s, p, loader, gathered); });
  }
}

// 32-bit sums of the 32 rows, in order, += those of the 16-bit lanes.
LUTRA_INLINE void flush(__m256i sum, __m256i high, __m256i* to) {
  const __m256i low = _mm256_sub_epi16(sum, _mm256_slli_epi16(high, 8));
  const __m256i a = _mm256_unpacklo_epi16(low, high);  // rows 0..7, 16..23
  const __m256i b = _mm256_unpackhi_epi16(low, high);
  to[0] = _mm256_add_epi32(to[0], _mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)));
  to[1] = _mm256_add_epi32(to[1], _mm256_cvtepu16_epi32(_mm256_castsi256_si128(b)));
  to[2] = _mm256_add_epi32(to[2], _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
  to[3] = _mm256_add_epi32(to[3], _mm256_cvtepu16_epi32(_mm256_extracti128_si256(b, 1)));
}

// Two outputs of kSubs times 32 rows; kGroup reads are added as bytes. Sums: [output][sub][4].
template <int kSlices, int kParts, int kGroup, int kSubs>
void respond_outputs(int32_t codes, const uint8_t* rows, const uint8_t* weights, const uint8_t* x,
                     size_t sub_tile, __m256i* sums) {
  constexpr int32_t kReads = kGroup > kParts ? kGroup : kParts;  // in a step
  constexpr int32_t kStepCodes = kReads / kParts;
  constexpr int32_t kRun = kWidenings / (kReads / kGroup);  // steps
  for (int32_t i = 0; i < kTogether * kSubs * 4; ++i) sums[i] = _mm256_setzero_si256();
  for (int32_t steps = (codes + kStepCodes - 1) / kStepCodes; steps > 0; steps -= kRun) {
    __m256i sum[kTogether * kSubs], high[kTogether * kSubs], bytes[kTogether * kSubs];
    LUTRA_UNROLL for (int32_t i = 0; i < kTogether * kSubs; ++i) {
      sum[i] = high[i] = _mm256_setzero_si256();
    }
    for (int32_t left = steps < kRun ? steps : kRun; left > 0; --left) {
#pragma GCC unroll 8
      for (int32_t read = 0; read < kReads; ++read) {
        LUTRA_UNROLL for (int32_t slice = 0; slice < kSlices; ++slice) {
          __m256i index[kSubs];
          LUTRA_UNROLL for (int32_t i = 0; i < kSubs; ++i) {
            index[i] = load(x + i * sub_tile + (read / kParts * kSlices + slice) * kSubRows);
            keep(index[i]);
          }
          LUTRA_UNROLL for (int32_t o = 0; o < kTogether; ++o) {
            const size_t w = weights[(read / kParts * kTogether + o) * kParts + read % kParts];
            const __m256i row = broadcast_half(rows + w * row_unit(kSlices) + 16 * slice);
            LUTRA_UNROLL for (int32_t i = 0; i < kSubs; ++i) {
              __m256i& to = bytes[o * kSubs + i];
              const __m256i found = _mm256_shuffle_epi8(row, index[i]);
              to = read % kGroup == 0 && slice == 0 ? found : _mm256_add_epi8(to, found);
              keep(to);
            }
          }
        }
        if (read % kGroup != kGroup - 1) continue;
        LUTRA_UNROLL for (int32_t i = 0; i < kTogether * kSubs; ++i) {
          sum[i] = _mm256_add_epi16(sum[i], bytes[i]);
          high[i] = _mm256_add_epi16(high[i], _mm256_srli_epi16(bytes[i], 8));
          keep(sum[i]);
          keep(high[i]);
        }
      }
      x += kStepCodes * kSlices * kSubRows;
      weights += kReads * kTogether;
    }
    LUTRA_UNROLL for (int32_t i = 0; i < kTogether * kSubs; ++i) {
      flush(sum[i], high[i], sums + 4 * i);
    }
  }
}

using RespondOutputs = void (*)(int32_t, const uint8_t*, const uint8_t*, const uint8_t*, size_t,
                                __m256i*);

template <int kSubs>
RespondOutputs find_respond(const LookupShape& s, const ResponseHeader& h) {
  const int32_t group = h.group;
  if (row_slices(s) == 2) {
    return group >= 4   ? respond_outputs<2, 1, 4, kSubs>
           : group == 2 ? respond_outputs<2, 1, 2, kSubs>
                        : respond_outputs<2, 1, 1, kSubs>;
  }
  if (row_slices(s) == 4) {
    return group >= 4   ? respond_outputs<4, 1, 4, kSubs>
           : group == 2 ? respond_outputs<4, 1, 2, kSubs>
                        : respond_outputs<4, 1, 1, kSubs>;
  }
  if (h.parts == 2) {
    return group >= 4   ? respond_outputs<1, 2, 4, kSubs>
           : group == 2 ? respond_outputs<1, 2, 2, kSubs>
                        : respond_outputs<1, 2, 1, kSubs>;
  }
  return group == 8   ? respond_outputs<1, 1, 8, kSubs>
         : group == 4 ? respond_outputs<1, 1, 4, kSubs>
         : group == 2 ? respond_outputs<1, 1, 2, kSubs>
                      : respond_outputs<1, 1, 1, kSubs>;
}

void respond(const LookupShape& s, const uint8_t* packed, const uint8_t* gathered, int32_t first,
             int32_t last, const Epilogue& e) {
  const Finish finish(e);
  const ResponseHeader& h = *reinterpret_cast<const ResponseHeader*>(packed);
  const int32_t subs = e.rows > kSubRows ? 2 : 1, codes = codes_of(s);
  const RespondOutputs run = subs == 2 ? find_respond<2>(s, h) : find_respond<1>(s, h);
  const size_t stream = static_cast<size_t>(round_up(codes, kCodeUnit)) * kTogether * h.parts;
  const int32_t* const constants = reinterpret_cast<const int32_t*>(packed + h.constants);
  for (int32_t m = first; m < last; m += kTogether) {
    __m256i sums[kTogether * 2 * 4];
    run(codes, packed + h.rows, packed + h.weights + m / kTogether * stream, gathered,
        sub_tile_bytes(s), sums);
    for (int32_t o = 0; o < kTogether && m + o < last; ++o) {
      for (int32_t i = 0; i < subs; ++i) {
        finish.sums<4>(m + o, i * kSubRows, constants[m + o], sums + (o * subs + i) * 4);
      }
    }
  }
}

// --- one row -------------------------------------------------------------------------------------
//
// The roles change: the responses of all weights to one activation are what vpshufb reads, and the
// indices are the weights of 32 outputs.

template <int kSlices>
void respond_line(int32_t depth, const uint8_t* table, const uint8_t* index, const uint8_t* x,
                  __m256i* sums) {
  for (int32_t i = 0; i < 4; ++i) sums[i] = _mm256_setzero_si256();
  for (int32_t d = 0; d < depth; d += kWidenings) {
    __m256i sum = _mm256_setzero_si256(), high = sum;
    const int32_t end = depth - d < kWidenings ? depth : d + kWidenings;
    for (int32_t i = d; i < end; ++i, index += kLineOutputs) {
      const uint8_t* const row = table + x[i] * (16 * kSlices);
      const __m256i w = load(index);
      __m256i found;
      if constexpr (kSlices == 1) {
        found = _mm256_shuffle_epi8(broadcast_half(row), w);
      } else {
        found = _mm256_setzero_si256();
        LUTRA_UNROLL for (int32_t slice = 0; slice < kSlices; ++slice) {
          const __m256i from = _mm256_sub_epi8(w, _mm256_set1_epi8(static_cast<char>(16 * slice)));
          const __m256i at = _mm256_adds_epu8(from, _mm256_set1_epi8(0x70));
          const __m256i part = _mm256_shuffle_epi8(broadcast_half(row + 16 * slice), at);
          found = _mm256_or_si256(found, part);
        }
      }
      sum = _mm256_add_epi16(sum, found);
      high = _mm256_add_epi16(high, _mm256_srli_epi16(found, 8));
    }
    flush(sum, high, sums);
  }
}

void respond_row(const LookupShape& s, const uint8_t* packed, const uint8_t* x, int32_t first,
                 int32_t last, int32_t* sums) {
  const ResponseHeader& h = *reinterpret_cast<const ResponseHeader*>(packed);
  const int32_t* const lows = reinterpret_cast<const int32_t*>(packed + h.row_low);
  uint32_t low = 0;
  for (int32_t d = 0; d < s.depth; ++d) low += static_cast<uint32_t>(lows[x[d]]);
  const __m256i constant = _mm256_set1_epi32(static_cast<int32_t>(low));
  auto* const run = weight_slices(s) == 1   ? respond_line<1>
                    : weight_slices(s) == 2 ? respond_line<2>
                                            : respond_line<3>;
  for (int32_t m = first; m < last;) {
    const int32_t block = m / kLineOutputs * kLineOutputs;
    __m256i line[4];
    run(s.depth, packed + h.row_table, packed + h.row_index + static_cast<size_t>(block) * s.depth,
        x, line);
    int32_t lanes[kLineOutputs];
    for (int32_t i = 0; i < 4; ++i) store(lanes + 8 * i, _mm256_add_epi32(line[i], constant));
    for (; m < last && m < block + kLineOutputs; ++m) sums[m - first] = lanes[m - block];
  }
}

}  // namespace
}  // namespace lutra
