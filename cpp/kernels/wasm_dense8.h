// WebAssembly: dense layers in int8. Private to wasm.cc.
#pragma once

#include "wasm_common.h"

namespace lutra {
namespace {

// The only dot product is that of 16-bit integers, so both operands are widened when they are
// packed and gathered: i32x4.dot multiplies two entries of four rows with two weights of an output.
// Eight rows and four outputs at a time: eight sums, two loads and four broadcasts for eight dot
// products.
//
// Packed weights: [4 outputs][pair of entries][output][2]; gathered values: [16
// rows][pair][row][2], both in 16 bits and zero padded.

LUTRA_INLINE int32_t pairs_of(int32_t depth) { return (depth + 1) / 2; }

size_t dense8_bytes(int32_t depth, int32_t outputs) {
  return static_cast<size_t>((outputs + kOutputs - 1) / kOutputs) * pairs_of(depth) * 16;
}

LUTRA_COLD void pack_dense8(int32_t depth, int32_t outputs, const int8_t* weights,
                            uint8_t* packed) {
  int16_t* to = reinterpret_cast<int16_t*>(packed);
  for (int32_t block = 0; block < outputs; block += kOutputs) {
    for (int32_t d = 0; d < depth; d += 2) {
      for (int32_t i = 0; i < 2 * kOutputs; ++i) {
        const int32_t m = block + i / 2, at = d + i % 2;
        const bool there = m < outputs && at < depth;
        *to++ = there ? weights[static_cast<size_t>(m) * depth + at] : int16_t{0};
      }
    }
  }
}

constexpr int32_t kPairBytes = kBlock * 4;  // of 16 rows

size_t gather8_bytes(int32_t depth) {
  return static_cast<size_t>(pairs_of(depth)) * (kRows / kBlock) * kPairBytes;
}

LUTRA_INLINE void store_pair(uint8_t* to, v128_t a, v128_t b) {
  const v128_t low = zip_low(a, b), high = zip_high(a, b);
  store(to, wasm_u16x8_extend_low_u8x16(low));
  store(to + 16, wasm_u16x8_extend_high_u8x16(low));
  store(to + 32, wasm_u16x8_extend_low_u8x16(high));
  store(to + 48, wasm_u16x8_extend_high_u8x16(high));
}

void gather8(int32_t depth, int32_t taps, const Patch& p, uint8_t* gathered) {
  for (int32_t row = 0; row < p.rows; row += kBlock) {
    Rows rows;
    find_rows(p, row, &rows);
    with_rows(rows, [&](const auto& loader) {
      Entries walk(p, taps, 0);
      for (int32_t d = 0; d < depth; d += 2, gathered += kPairBytes) {
        const v128_t a = loader.load(walk.next());
        store_pair(gathered, a, d + 1 < depth ? loader.load(walk.next()) : zeros());
      }
    });
  }
}

void dense8(int32_t depth, int32_t, const uint8_t* packed, const uint8_t* gathered, int32_t first,
            int32_t last, const Epilogue& e) {
  const Finish finish(e);
  const int32_t pairs = pairs_of(depth);
  for (int32_t m = first; m < last; m += kOutputs) {
    const uint8_t* const weights = packed + static_cast<size_t>(m / kOutputs) * pairs * 16;
    for (int32_t row = 0; row < e.rows; row += kBlock) {
      const uint8_t* const from = gathered + static_cast<size_t>(row / kBlock) * pairs * kPairBytes;
      v128_t sum[kOutputs][4];
      for (int32_t half = 0; half < 2; ++half) {
        const uint8_t *x = from + half * (kPairBytes / 2), *w = weights;
        v128_t s[kOutputs][2];
#pragma GCC unroll 4
        for (auto& one : s) one[0] = one[1] = zeros();
        for (int32_t i = 0; i < pairs; ++i, x += kPairBytes, w += 16) {
          const v128_t x0 = load(x), x1 = load(x + 16);
#pragma GCC unroll 4
          for (int32_t j = 0; j < kOutputs; ++j) {
            const v128_t v = wasm_v128_load32_splat(w + 4 * j);
            s[j][0] = wasm_i32x4_add(s[j][0], wasm_i32x4_dot_i16x8(x0, v));
            s[j][1] = wasm_i32x4_add(s[j][1], wasm_i32x4_dot_i16x8(x1, v));
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
  const int32_t pairs = pairs_of(depth);
  for (int32_t m = first; m < last; m += kOutputs) {
    const uint8_t* w = packed + static_cast<size_t>(m / kOutputs) * pairs * 16;
    v128_t even = zeros(), odd = even;
    for (int32_t i = 0; i < pairs; i += 8) {  // 16 entries; x is padded to a multiple of 64
      const v128_t bytes = load(x + 2 * i);
      const v128_t low = wasm_u16x8_extend_low_u8x16(bytes);
      const v128_t high = wasm_u16x8_extend_high_u8x16(bytes);
      const auto add = [&](int32_t pair, v128_t v, v128_t& sum) __attribute__((always_inline)) {
        if (i + pair >= pairs) return;
        sum = wasm_i32x4_add(sum, wasm_i32x4_dot_i16x8(load(w + 16 * (i + pair)), v));
      };
      add(0, wasm_i32x4_shuffle(low, low, 0, 0, 0, 0), even);
      add(1, wasm_i32x4_shuffle(low, low, 1, 1, 1, 1), odd);
      add(2, wasm_i32x4_shuffle(low, low, 2, 2, 2, 2), even);
      add(3, wasm_i32x4_shuffle(low, low, 3, 3, 3, 3), odd);
      add(4, wasm_i32x4_shuffle(high, high, 0, 0, 0, 0), even);
      add(5, wasm_i32x4_shuffle(high, high, 1, 1, 1, 1), odd);
      add(6, wasm_i32x4_shuffle(high, high, 2, 2, 2, 2), even);
      add(7, wasm_i32x4_shuffle(high, high, 3, 3, 3, 3), odd);
    }
    alignas(16) int32_t lanes[kOutputs];
    store(lanes, wasm_i32x4_add(even, odd));
    for (int32_t j = 0; j < kOutputs && m + j < last; ++j) sums[m + j - first] = lanes[j];
  }
}

}  // namespace
}  // namespace lutra
