// WebAssembly with relaxed SIMD: dense layers in int8. Private to wasm_dot.cc.
#pragma once

#include "wasm_dot.h"

namespace lutra {
namespace {

// Four entries of a row in a word: a dot product of bytes makes sums of two of them in 16 bits, and
// one with ones the sum of all four. Eight rows and four outputs at a time.
//
// Packed weights: [4 outputs][quad of entries][output][4]; gathered values: [16
// rows][quad][row][4], both bytes and zero padded.

LUTRA_INLINE int32_t quads_of(int32_t depth) { return (depth + 3) / 4; }

size_t dense8_bytes(int32_t depth, int32_t outputs) {
  return static_cast<size_t>((outputs + kOutputs - 1) / kOutputs) * quads_of(depth) * 16;
}

LUTRA_COLD void pack_dense8(int32_t depth, int32_t outputs, const int8_t* weights,
                            uint8_t* packed) {
  for (int32_t block = 0; block < outputs; block += kOutputs) {
    for (int32_t d = 0; d < depth; d += 4) {
      for (int32_t i = 0; i < 4 * kOutputs; ++i) {
        const int32_t m = block + i / 4, at = d + i % 4;
        const bool there = m < outputs && at < depth;
        *packed++ =
            there ? static_cast<uint8_t>(weights[static_cast<size_t>(m) * depth + at]) : uint8_t{0};
      }
    }
  }
}

constexpr int32_t kQuadBytes = kBlock * 4;  // of 16 rows

size_t gather8_bytes(int32_t depth) {
  return static_cast<size_t>(quads_of(depth)) * (kRows / kBlock) * kQuadBytes;
}

void gather8(int32_t depth, int32_t taps, const Patch& p, uint8_t* gathered) {
  for (int32_t row = 0; row < p.rows; row += kBlock) {
    Rows rows;
    find_rows(p, row, &rows);
    with_rows(rows, [&](const auto& loader) {
      Entries walk(p, taps, 0);
      for (int32_t d = 0; d < depth; d += 4, gathered += kQuadBytes) {
        v128_t x[4], q[4];
        for (int32_t i = 0; i < 4; ++i) x[i] = d + i < depth ? loader.load(walk.next()) : zeros();
        zip_quads(x[0], x[1], x[2], x[3], q);
#pragma GCC unroll 4
        for (int32_t i = 0; i < 4; ++i) store(gathered + 16 * i, q[i]);
      }
    });
  }
}

void dense8(int32_t depth, int32_t, const uint8_t* packed, const uint8_t* gathered, int32_t first,
            int32_t last, const Epilogue& e) {
  const Finish finish(e);
  const int32_t quads = quads_of(depth);
  const v128_t ones = wasm_i16x8_splat(1);
  for (int32_t m = first; m < last; m += kOutputs) {
    const uint8_t* const weights = packed + static_cast<size_t>(m / kOutputs) * quads * 16;
    for (int32_t row = 0; row < e.rows; row += kBlock) {
      const uint8_t* const from = gathered + static_cast<size_t>(row / kBlock) * quads * kQuadBytes;
      v128_t sum[kOutputs][4];
      for (int32_t half = 0; half < 2; ++half) {
        const uint8_t *x = from + half * (kQuadBytes / 2), *w = weights;
        v128_t s[kOutputs][2];
#pragma GCC unroll 4
        for (auto& one : s) one[0] = one[1] = zeros();
        for (int32_t i = 0; i < quads; ++i, x += kQuadBytes, w += 16) {
          const v128_t x0 = load(x), x1 = load(x + 16);
#pragma GCC unroll 4
          for (int32_t j = 0; j < kOutputs; ++j) {
            const v128_t v = wasm_v128_load32_splat(w + 4 * j);
            s[j][0] = wasm_i32x4_add(s[j][0], wasm_i32x4_dot_i16x8(dot_bytes(v, x0), ones));
            s[j][1] = wasm_i32x4_add(s[j][1], wasm_i32x4_dot_i16x8(dot_bytes(v, x1), ones));
          }
        }
#pragma GCC unroll 4
        for (int32_t j = 0; j < kOutputs; ++j) {
          sum[j][2 * half] = s[j][0];
          sum[j][2 * half + 1] = s[j][1];
        }
      }
      for (int32_t j = 0; j < kOutputs && m + j < last; ++j) finish.sums(m + j, row, 0, sum[j]);
    }
  }
}

// One row times a block of 4 outputs, which are the lanes.
void dense8_row(int32_t depth, int32_t, const uint8_t* packed, const uint8_t* x, int32_t first,
                int32_t last, int32_t* sums) {
  const int32_t quads = quads_of(depth);
  const v128_t ones = wasm_i16x8_splat(1);
  for (int32_t m = first; m < last; m += kOutputs) {
    const uint8_t* w = packed + static_cast<size_t>(m / kOutputs) * quads * 16;
    v128_t sum = zeros();
    for (int32_t i = 0; i < quads; ++i, w += 16) {  // x is padded to a multiple of 64
      const v128_t v = wasm_v128_load32_splat(x + 4 * i);
      sum = wasm_i32x4_add(sum, wasm_i32x4_dot_i16x8(dot_bytes(load(w), v), ones));
    }
    alignas(16) int32_t lanes[kOutputs];
    store(lanes, sum);
    for (int32_t j = 0; j < kOutputs && m + j < last; ++j) sums[m + j - first] = lanes[j];
  }
}

}  // namespace
}  // namespace lutra
