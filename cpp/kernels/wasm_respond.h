// WebAssembly: lookup layers. Private to wasm_kernels.h.
//
// Swizzles read the row of a weight, one, two or four registers, at the activation indices of 16
// rows of the tile. The bytes that they find are unsigned. As many of them as cannot overflow are
// added as bytes, a "group", and groups to sums of 16 bits as wasm_tables.h says: these hold 257
// groups.
#pragma once

#include "responses.h"
#include "wasm_lookup.h"

namespace lutra {
namespace {

constexpr int32_t kWidenings = 257;   // 257 * 255 = 2^16 - 1
constexpr int32_t kCodeUnit = 4;      // codes of a tile are padded to a multiple of this
constexpr int32_t kTogether = 2;      // outputs that share loads of indices
constexpr int32_t kLineOutputs = 16;  // outputs per block of weight indices for single rows

LUTRA_INLINE int32_t codes_of(const LookupShape& s) {
  return paired(s) ? (s.depth + 1) / 2 : s.depth;
}

// Gathered indices: [16 rows][code][row]. A code is an activation, or of 4 levels entries 2 i and
// 2 i + 1. Codes that are missing are 0.
LUTRA_INLINE size_t index_block_bytes(const LookupShape& s) {
  return static_cast<size_t>(round_up(codes_of(s), kCodeUnit)) * kBlock;
}

size_t index_bytes(const LookupShape& s) { return index_block_bytes(s) * (kRows / kBlock); }

LUTRA_INLINE int32_t row_bytes(const LookupShape& s) { return 16 * row_slices(s); }
// Of the responses of all weights to one activation, for single rows.
LUTRA_INLINE int32_t line_bytes(const LookupShape& s) {
  return s.weights <= 16 ? 16 : s.weights <= 32 ? 32 : 64;
}

// Packed: these, then rows [part][weight or pair][bytes], constants by output, rows of weights
// [2 outputs][code][output][part] as bytes, and for single rows the table by activations, the
// minima of its rows, and weight indices [16 outputs][entry][output].
struct ResponseHeader {
  int32_t parts, group;
  size_t rows, constants, weights, line_table, line_low, line_index, total;

  ResponseHeader(const LookupShape& s, bool joint) {
    parts = paired(s) && !joint ? 2 : 1;
    group = 1;
    const size_t outputs = static_cast<size_t>(round_up(s.outputs, kTogether));
    const size_t kinds = static_cast<size_t>(joint ? s.weights * s.weights : s.weights * parts);
    rows = 64;
    constants = rows + kinds * static_cast<size_t>(row_bytes(s));
    weights = constants + outputs * sizeof(int32_t);
    const size_t codes = static_cast<size_t>(round_up(codes_of(s), kCodeUnit));
    line_table = weights + outputs * codes * static_cast<size_t>(parts);
    line_table = (line_table + 15) / 16 * 16;
    line_low = line_index = total = line_table;
    if (s.taps != 1) return;
    line_low += static_cast<size_t>(s.levels * line_bytes(s));
    line_index = line_low + static_cast<size_t>(s.levels) * sizeof(int32_t);
    total = line_index + static_cast<size_t>(round_up(s.outputs, kLineOutputs)) * s.depth;
  }
};

size_t response_bytes(const LookupShape& s) {
  const size_t apart = ResponseHeader(s, false).total;
  if (!paired(s) || s.weights > kJointWeights) return apart;
  const size_t joint = ResponseHeader(s, true).total;
  return joint > apart ? joint : apart;
}

LUTRA_COLD void pack_lines(const LookupShape& s, const ResponseHeader& h, const int8_t* table,
                           const uint8_t* weight, uint8_t* packed) {
  const int32_t row = line_bytes(s);
  int32_t* const lows = reinterpret_cast<int32_t*>(packed + h.line_low);
  for (int32_t i = 0; i < s.levels; ++i) {
    const int8_t* const from = table + i * s.weights;
    int32_t low = from[0];
    for (int32_t w = 1; w < s.weights; ++w) low = from[w] < low ? from[w] : low;
    lows[i] = low;
    for (int32_t w = 0; w < row; ++w) {
      packed[h.line_table + i * row + w] =
          w < s.weights ? static_cast<uint8_t>(from[w] - low) : uint8_t{0};
    }
  }
  uint8_t* to = packed + h.line_index;
  for (int32_t block = 0; block < s.outputs; block += kLineOutputs) {
    for (int32_t d = 0; d < s.depth; ++d) {
      for (int32_t m = block; m < block + kLineOutputs; ++m) {
        *to++ = m < s.outputs ? weight[static_cast<size_t>(m) * s.depth + d] : uint8_t{0};
      }
    }
  }
}

LUTRA_COLD void pack_responses(const LookupShape& s, const int8_t* table, const uint8_t* weight,
                               uint8_t* packed) {
  const Responses r(s, table);
  const bool joint = r.joint();
  ResponseHeader h(s, joint);
  const int32_t most = r.range == 0 ? 255 : 255 / (joint ? 2 * r.range : r.range);
  h.group = most >= 4 ? 4 : most >= 2 ? 2 : 1;
  *reinterpret_cast<ResponseHeader*>(packed) = h;
  const int32_t n = s.weights;
  uint8_t* to = packed + h.rows;
  for (int32_t kind = 0; kind < (joint ? n * n : n * h.parts); ++kind) {
    for (int32_t i = 0; i < row_bytes(s); ++i) {
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
        *to++ = static_cast<uint8_t>(index(d) * n + index(d + 1));
        continue;
      }
      for (int32_t part = 0; part < h.parts; ++part) {
        *to++ = static_cast<uint8_t>(part * n + index(d + part));
      }
    }
  }
  if (s.taps == 1) pack_lines(s, h, table, weight, packed);
}

template <typename Loader>
LUTRA_INLINE void gather_index_block(const LookupShape& s, const Patch& p, const Loader& rows,
                                     uint8_t* to) {
  Entries walk(p, s.taps, 0);
  const int32_t codes = codes_of(s);
  for (int32_t i = 0; i < codes; ++i, to += kBlock) {
    v128_t x = rows.load(walk.next());
    if (paired(s) && 2 * i + 1 < s.depth) {  // indices below 4
      x = wasm_v128_or(x, wasm_i8x16_shl(rows.load(walk.next()), 2));
    }
    store(to, x);
  }
  for (int32_t i = codes; i < round_up(codes, kCodeUnit); ++i, to += kBlock) {
    store(to, zeros());
  }
}

void gather_indices(const LookupShape& s, const Patch& p, uint8_t* gathered) {
  for (int32_t row = 0; row < p.rows; row += kBlock, gathered += index_block_bytes(s)) {
    Rows rows;
    find_rows(p, row, &rows);
    with_rows(rows, [&](const auto& loader) { gather_index_block(s, p, loader, gathered); });
  }
}

// The bytes of a row at the indices of 16 rows of the tile.
template <int kBytes>
LUTRA_INLINE v128_t found(const uint8_t* row, v128_t index) {
  v128_t v = wasm_i8x16_swizzle(load(row), index);
#pragma GCC unroll 4
  for (int32_t i = 16; i < kBytes; i += 16) {
    index = wasm_i8x16_sub(index, wasm_i8x16_splat(16));
    v = wasm_v128_or(v, wasm_i8x16_swizzle(load(row + i), index));
  }
  return v;
}

// Two outputs of kBlocks times 16 rows; kGroup reads are added as bytes. Sums: [output][block][4].
template <int kBytes, int kParts, int kGroup, int kBlocks>
[[gnu::noinline]] void respond_outputs(int32_t codes, const uint8_t* rows, const uint8_t* weights,
                                       const uint8_t* x, size_t block, v128_t* total) {
  constexpr int32_t kReads = kGroup > kParts ? kGroup : kParts;  // in a step
  constexpr int32_t kStepCodes = kReads / kParts;
  constexpr int32_t kRun = kWidenings / (kReads / kGroup);  // steps
  for (int32_t i = 0; i < kTogether * kBlocks * 4; ++i) total[i] = zeros();
  for (int32_t steps = (codes + kStepCodes - 1) / kStepCodes; steps > 0; steps -= kRun) {
    GroupSum sum[kTogether][kBlocks];
    for (int32_t left = steps < kRun ? steps : kRun; left > 0; --left) {
      v128_t bytes[kTogether][kBlocks];
#pragma GCC unroll 4
      for (int32_t read = 0; read < kReads; ++read) {
        v128_t index[kBlocks];
#pragma GCC unroll 2
        for (int32_t i = 0; i < kBlocks; ++i) {
          index[i] = load(x + i * block + read / kParts * kBlock);
        }
#pragma GCC unroll 2
        for (int32_t o = 0; o < kTogether; ++o) {
          const size_t w = weights[(read / kParts * kTogether + o) * kParts + read % kParts];
#pragma GCC unroll 2
          for (int32_t i = 0; i < kBlocks; ++i) {
            const v128_t v = found<kBytes>(rows + w * kBytes, index[i]);
            bytes[o][i] = read % kGroup == 0 ? v : wasm_i8x16_add(bytes[o][i], v);
          }
        }
        if (read % kGroup != kGroup - 1) continue;
#pragma GCC unroll 2
        for (int32_t o = 0; o < kTogether; ++o) {
#pragma GCC unroll 2
          for (int32_t i = 0; i < kBlocks; ++i) sum[o][i].add(bytes[o][i]);
        }
      }
      x += kStepCodes * kBlock;
      weights += kReads * kTogether;
    }
    for (int32_t o = 0; o < kTogether; ++o) {
      for (int32_t i = 0; i < kBlocks; ++i) sum[o][i].resolve(total + (o * kBlocks + i) * 4);
    }
  }
}

using RespondOutputs = void (*)(int32_t, const uint8_t*, const uint8_t*, const uint8_t*, size_t,
                                v128_t*);

template <int kBytes, int kParts, int kBlocks>
RespondOutputs find_respond(int32_t group) {
  return group == 4   ? respond_outputs<kBytes, kParts, 4, kBlocks>
         : group == 2 ? respond_outputs<kBytes, kParts, 2, kBlocks>
                      : respond_outputs<kBytes, kParts, 1, kBlocks>;
}

template <int kBlocks>
RespondOutputs find_respond(const LookupShape& s, const ResponseHeader& h) {
  if constexpr (kBlocks == 1) {  // of wider rows two blocks would leave too few registers
    if (row_bytes(s) == 32) return find_respond<32, 1, kBlocks>(h.group);
    if (row_bytes(s) == 64) return find_respond<64, 1, kBlocks>(h.group);
  }
  return h.parts == 2 ? find_respond<16, 2, kBlocks>(h.group)
                      : find_respond<16, 1, kBlocks>(h.group);
}

template <int kBlocks>
void respond_blocks(const LookupShape& s, const uint8_t* packed, const uint8_t* gathered,
                    int32_t first, int32_t last, int32_t row, const Finish& finish) {
  const ResponseHeader& h = *reinterpret_cast<const ResponseHeader*>(packed);
  const int32_t codes = codes_of(s);
  const RespondOutputs run = find_respond<kBlocks>(s, h);
  const size_t stream = static_cast<size_t>(round_up(codes, kCodeUnit)) * kTogether * h.parts;
  const int32_t* const constants = reinterpret_cast<const int32_t*>(packed + h.constants);
  for (int32_t m = first; m < last; m += kTogether) {
    v128_t total[kTogether * kBlocks * 4];
    run(codes, packed + h.rows, packed + h.weights + m / kTogether * stream, gathered,
        index_block_bytes(s), total);
    for (int32_t o = 0; o < kTogether && m + o < last; ++o) {
      for (int32_t i = 0; i < kBlocks; ++i) {
        finish.sums(m + o, row + i * kBlock, constants[m + o], total + (o * kBlocks + i) * 4);
      }
    }
  }
}

void respond(const LookupShape& s, const uint8_t* packed, const uint8_t* gathered, int32_t first,
             int32_t last, const Epilogue& e) {
  const Finish finish(e);
  const size_t block = index_block_bytes(s);
  const int32_t blocks = blocks_of(e.rows);
  int32_t i = 0;
  for (; row_bytes(s) == 16 && i + 2 <= blocks; i += 2) {
    respond_blocks<2>(s, packed, gathered + i * block, first, last, i * kBlock, finish);
  }
  for (; i < blocks; ++i) {
    respond_blocks<1>(s, packed, gathered + i * block, first, last, i * kBlock, finish);
  }
}

// --- one row -------------------------------------------------------------------------------------
//
// The roles change: the responses of all weights to one activation are what swizzles read, and the
// indices are the weights of 16 outputs.

template <int kBytes>
void respond_line(int32_t depth, const uint8_t* table, const uint8_t* index, const uint8_t* x,
                  v128_t* total) {
  for (int32_t i = 0; i < 4; ++i) total[i] = zeros();
  for (int32_t d = 0; d < depth; d += kWidenings) {
    GroupSum sum;
    const int32_t end = depth - d < kWidenings ? depth : d + kWidenings;
    for (int32_t i = d; i < end; ++i, index += kLineOutputs) {
      sum.add(found<kBytes>(table + x[i] * kBytes, load(index)));
    }
    sum.resolve(total);
  }
}

void respond_row(const LookupShape& s, const uint8_t* packed, const uint8_t* x, int32_t first,
                 int32_t last, int32_t* sums) {
  const ResponseHeader& h = *reinterpret_cast<const ResponseHeader*>(packed);
  const int32_t* const lows = reinterpret_cast<const int32_t*>(packed + h.line_low);
  uint32_t low = 0;
  for (int32_t d = 0; d < s.depth; ++d) low += static_cast<uint32_t>(lows[x[d]]);
  auto* const run = line_bytes(s) == 16   ? respond_line<16>
                    : line_bytes(s) == 32 ? respond_line<32>
                                          : respond_line<64>;
  for (int32_t m = first; m < last;) {
    const int32_t block = m / kLineOutputs * kLineOutputs;
    v128_t line[4];
    run(s.depth, packed + h.line_table,
        packed + h.line_index + static_cast<size_t>(block) * s.depth, x, line);
    alignas(16) int32_t lanes[kLineOutputs];
    const v128_t all = wasm_i32x4_splat(static_cast<int32_t>(low));
    for (int32_t i = 0; i < 4; ++i) store(lanes + 4 * i, wasm_i32x4_add(line[i], all));
    for (; m < last && m < block + kLineOutputs; ++m) sums[m - first] = lanes[m - block];
  }
}

}  // namespace
}  // namespace lutra
