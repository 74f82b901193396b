// AVX2: convolutions in int8 that read their activations where they are. Private to avx2.cc.
#pragma once

#include "avx2_common.h"

namespace lutra {
namespace {

// A pixel's four channels are a dword, so that 8 neighbouring rows are one load at any tap, and
// nothing is gathered. 8 sums in registers: 8 outputs x 8 rows, weights broadcast.
//
// Three taps of a plane go together, a "trio". vpmaddubsw adds two products in 16 bits
// (2 * 127 * 127 fits). Where the weights are such that the sums of all three taps fit 16 bits too,
// for every activation there can be, they are added before vpmaddwd makes 32 bits of two of them:
// seven instructions, four of them multiplications, for 96 products. Activations are 0..127, so it
// is the sums of the positive and of the negative weights that count, each by itself. Else two
// taps, or none, go together (eight and nine instructions).
//
// Sums of 64 rows go through the first cache, so that the epilogue sets up an output once.
//
// Packed: blocks of 8 outputs, each with its trios in the order of how many taps go together: a
// TrioOrder, (trios) a number, (trios) [tap of the trio][output][4 channels]. Copies: where the
// taps of trios are; offsets of taps; (planes, taps, 64 rows).

constexpr int32_t kConvBlock = 8;  // outputs
constexpr int32_t kTapBytes = kConvBlock * 4;
constexpr int32_t kTrioBytes = 3 * kTapBytes;

LUTRA_INLINE int32_t planes_of(const Conv8Shape& s) { return (s.channels + 3) / 4; }
LUTRA_INLINE int32_t trios_of(const Conv8Shape& s) { return (s.taps + 2) / 3; }
LUTRA_INLINE int32_t block_trios(const Conv8Shape& s) { return planes_of(s) * trios_of(s); }

struct TrioOrder {
  int32_t count[4];  // of the trios of which so many taps go together
};
LUTRA_INLINE size_t block_head_bytes(const Conv8Shape& s) {
  return sizeof(TrioOrder) + static_cast<size_t>(block_trios(s)) * sizeof(int32_t);
}
LUTRA_INLINE size_t conv_block_bytes(const Conv8Shape& s) {
  return block_head_bytes(s) + static_cast<size_t>(block_trios(s)) * kTrioBytes;
}

size_t conv8_bytes(const Conv8Shape& s) {
  return static_cast<size_t>(round_up(s.outputs, kConvBlock) / kConvBlock) * conv_block_bytes(s);
}

// How many taps of a trio go together.
uint8_t taps_together(const int8_t* trio) {
  uint8_t together = 3;
  for (int32_t pair = 0; pair < 2 * kConvBlock; ++pair) {  // a lane of 16 bits
    int32_t positive = 0, negative = 0;
    for (int32_t t = 0; t < together; ++t) {
      for (int32_t i = 0; i < 2; ++i) {
        const int32_t w = trio[t * kTapBytes + 2 * pair + i];
        (w > 0 ? positive : negative) += w;
      }
      if (127 * positive > INT16_MAX || 127 * negative < INT16_MIN) together = t < 2 ? 1 : 2;
    }
  }
  return together;
}

// The weights of a trio for the outputs of a block.
void pack_trio(const Conv8Shape& s, const int8_t* weights, int32_t block, int32_t trio,
               int8_t* to) {
  const int32_t plane = trio / trios_of(s), first = trio % trios_of(s) * 3;
  for (int32_t t = first; t < first + 3; ++t) {
    for (int32_t m = block; m < block + kConvBlock; ++m, to += 4) {
      const int8_t* from = weights + (static_cast<size_t>(m) * s.channels + 4 * plane) * s.taps + t;
      for (int32_t i = 0; i < 4; ++i, from += s.taps) {
        const bool there = t < s.taps && m < s.outputs && 4 * plane + i < s.channels;
        to[i] = there ? *from : int8_t{0};
      }
    }
  }
}

// A block's trios and their numbers, as they are packed.
struct PackedTrios {
  int32_t* number;
  int8_t* weights;

  void copy(int32_t from, int32_t to) const {
    if (from == to) return;
    number[to] = number[from];
    __builtin_memcpy(weights + to * kTrioBytes, weights + from * kTrioBytes, kTrioBytes);
  }
};

void pack_conv8(const Conv8Shape& s, const int8_t* weights, uint8_t* packed) {
  for (int32_t block = 0; block < s.outputs; block += kConvBlock, packed += conv_block_bytes(s)) {
    TrioOrder* const order = reinterpret_cast<TrioOrder*>(packed);
    int32_t* const count = order->count;
    const PackedTrios trios{reinterpret_cast<int32_t*>(order + 1),
                            reinterpret_cast<int8_t*>(packed + block_head_bytes(s))};
    for (int32_t i = 0; i < 4; ++i) count[i] = 0;
    for (int32_t i = 0; i < block_trios(s); ++i) {
      int8_t bytes[kTrioBytes];
      pack_trio(s, weights, block, i, bytes);
      const int32_t together = taps_together(bytes);
      int32_t at = i;  // the first of every kind behind it moves to the end of that kind
      for (int32_t kind = 1; kind < together; ++kind) {
        trios.copy(at - count[kind], at);
        at -= count[kind];
      }
      trios.number[at] = i;
      __builtin_memcpy(trios.weights + at * kTrioBytes, bytes, kTrioBytes);
      ++count[together];
    }
  }
}

// Rows are ascending, and no two are the same.
LUTRA_INLINE bool in_line(const Patch& p, int32_t row) {
  const int32_t last = p.rows - row < 8 ? p.rows - row - 1 : 7;
  return p.row[row + last] - p.row[row] == 4 * last;
}
bool in_place(const Patch& p) {
  for (int32_t row = 0; row < p.rows; row += 8) {
    if (!in_line(p, row)) return false;
  }
  return true;
}

struct TrioTaps {
  int64_t tap[3];  // bytes from the first plane; those that there are not repeat the last one
};
LUTRA_INLINE size_t trio_taps_bytes(const Conv8Shape& s) {
  return static_cast<size_t>(block_trios(s)) * sizeof(TrioTaps);
}
LUTRA_INLINE size_t head_bytes(const Conv8Shape& s) {  // before the copies of rows
  return trio_taps_bytes(s) + static_cast<size_t>(round_up(s.taps * 4, 32));
}
size_t conv8_copy_bytes(const Conv8Shape& s) {
  return head_bytes(s) + static_cast<size_t>(planes_of(s)) * s.taps * kRows * 4;
}

// 8 rows that are one line, or the end of one and the beginning of another, or anything.
struct EightRows {
  const int32_t* row;
  int32_t lines;
  __m256i second;  // the lanes of the second line

  LUTRA_INLINE EightRows(const Patch& p, int32_t first) : row(p.row + first) {
    lines = in_line(p, first) ? 1 : p.rows - first < 8 ? 3 : 2;
    const __m256i lane = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i offset = load(row);
    const __m256i one = _mm256_add_epi32(_mm256_set1_epi32(row[0]), lane);
    const __m256i two = _mm256_add_epi32(_mm256_set1_epi32(row[7] - 28), lane);
    second = _mm256_cmpeq_epi32(offset, two);
    const __m256i either = _mm256_or_si256(second, _mm256_cmpeq_epi32(offset, one));
    if (_mm256_movemask_epi8(either) != -1) lines = lines == 2 ? 3 : lines;
  }
  LUTRA_INLINE void copy(const uint8_t* from, uint8_t* to) const {
    if (lines == 1) return store(to, load(from + row[0]));
    if (lines == 2) {
      return store(to, _mm256_blendv_epi8(load(from + row[0]), load(from + row[7] - 28), second));
    }
    for (int32_t r = 0; r < 8; ++r) __builtin_memcpy(to + 4 * r, from + row[r], 4);
  }
};

void copy_conv8(const Conv8Shape& s, const Patch& p, uint8_t* copies) {
  if (in_place(p)) return;
  int32_t* const taps = reinterpret_cast<int32_t*>(copies + trio_taps_bytes(s));
  for (int32_t t = 0; t < s.taps; ++t) taps[t] = t * kRows * 4;
  for (int32_t row = 0; row < p.rows; row += 8) {
    const EightRows eight(p, row);
    uint8_t* to = copies + head_bytes(s) + 4 * row;
    for (int32_t i = 0; i < planes_of(s); ++i) {
      for (int32_t t = 0; t < s.taps; ++t, to += kRows * 4) {
        eight.copy(p.planes + i * p.plane + p.tap[t], to);
      }
    }
  }
}

// Adds `count` trios.
template <int kTogether>
LUTRA_INLINE void add_trios(const TrioTaps* taps, const int32_t*& trio, const uint8_t*& w,
                            int32_t count, const uint8_t* x, __m256i* sum) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (; count > 0; --count, ++trio, w += kTrioBytes) {
    const int64_t* const tap = taps[*trio].tap;
    const __m256i x0 = load(x + tap[0]), x1 = load(x + tap[1]), x2 = load(x + tap[2]);
#pragma GCC unroll 8
    for (int32_t j = 0; j < kConvBlock; ++j) {
      const uint8_t* const at = w + 4 * j;
      __m256i a = _mm256_maddubs_epi16(x0, broadcast_word(at));
      const __m256i b = _mm256_maddubs_epi16(x1, broadcast_word(at + kTapBytes));
      const __m256i c = _mm256_maddubs_epi16(x2, broadcast_word(at + 2 * kTapBytes));
      if (kTogether >= 2) a = _mm256_add_epi16(a, b);
      if (kTogether >= 3) a = _mm256_add_epi16(a, c);
      sum[j] = _mm256_add_epi32(sum[j], _mm256_madd_epi16(a, ones));
      if (kTogether < 2) sum[j] = _mm256_add_epi32(sum[j], _mm256_madd_epi16(b, ones));
      if (kTogether < 3) sum[j] = _mm256_add_epi32(sum[j], _mm256_madd_epi16(c, ones));
      keep(sum[j]);
    }
  }
}

// 8 outputs of the 8 rows that begin at x; sums of an output are kRows apart.
[[gnu::noinline]] void conv_eight(const Conv8Shape& s, const uint8_t* block, const TrioTaps* taps,
                                  const uint8_t* x, int32_t* sums) {
  const TrioOrder& order = *reinterpret_cast<const TrioOrder*>(block);
  const int32_t* trio = reinterpret_cast<const int32_t*>(&order + 1);
  const uint8_t* w = block + block_head_bytes(s);
  __m256i sum[kConvBlock];
#pragma GCC unroll 8
  for (int32_t j = 0; j < kConvBlock; ++j) sum[j] = _mm256_setzero_si256();
  add_trios<3>(taps, trio, w, order.count[3], x, sum);
  add_trios<2>(taps, trio, w, order.count[2], x, sum);
  add_trios<1>(taps, trio, w, order.count[1], x, sum);
#pragma GCC unroll 8
  for (int32_t j = 0; j < kConvBlock; ++j) store(sums + j * kRows, sum[j]);
}

void conv8(const Conv8Shape& s, const uint8_t* packed, const Patch& p, uint8_t* copies,
           int32_t first, int32_t last, const Epilogue& e) {
  const Finish finish(e);
  const bool direct = in_place(p);
  const uint8_t* const planes = direct ? p.planes : copies + head_bytes(s);
  const int64_t plane = direct ? p.plane : int64_t{kRows} * 4 * s.taps;
  const int32_t* const tap =
      direct ? p.tap : reinterpret_cast<const int32_t*>(copies + trio_taps_bytes(s));
  TrioTaps* const taps = reinterpret_cast<TrioTaps*>(copies);
  for (int32_t i = 0; i < planes_of(s); ++i) {
    for (int32_t t = 0; t < 3 * trios_of(s); ++t) {
      taps[i * trios_of(s) + t / 3].tap[t % 3] = i * plane + tap[t < s.taps ? t : s.taps - 1];
    }
  }
  alignas(32) int32_t sums[kConvBlock][kRows] = {};
  for (int32_t m = first; m < last; m += kConvBlock) {
    const uint8_t* const block = packed + static_cast<size_t>(m / kConvBlock) * conv_block_bytes(s);
    for (int32_t row = 0; row < e.rows; row += 8) {
      const uint8_t* const x = planes + (direct ? p.row[row] : 4 * row);
      conv_eight(s, block, taps, x, sums[0] + row);
    }
    for (int32_t j = 0; j < kConvBlock && m + j < last; ++j) {
      for (int32_t row = 0; row < e.rows; row += kSubRows) {
        const int32_t* const from = sums[j] + row;
        const __m256i y[4] = {load(from), load(from + 8), load(from + 16), load(from + 24)};
        if (narrow(e.rows - row)) {
          finish.sums<2>(m + j, row, 0, y);
        } else {
          finish.sums<4>(m + j, row, 0, y);
        }
      }
    }
  }
}

}  // namespace
}  // namespace lutra
