// Products of few rows with ternary weights at five in a byte: 1.6 bits a weight are read. Private
// to avx512.cc.
//
// A byte is the index of the sum of five activations and its sign: with v = sum over j of
// 3^j * (-1, 0 or 1), -121..121, the low seven bits are |v| and the highest is the sign. A table
// has an entry for each |v|, of 16 bits, in four registers: low bytes in two, high ones in two.
// vpermi2b looks at seven bits of an index, so two of them read the entries of 64 outputs, that is
// of 320 products. Bytes of negative v are complemented, which makes -entry - 1 of an entry; how
// many of them an output has, packing counts. That is a load and nine instructions for 320
// products (spread the sign, two vpermi2b, two xor, two to interleave, two additions), where
// unpacking bits for vpdpbusd takes about eleven for 256.
//
// Packed weights, for each group of them:
//   [tile of 51 bytes][64 outputs][byte of the tile][64 bytes], then [output] int32: negative bytes
// The 64 bytes are of one output each, in the order that interleaving puts right.
#pragma once

#include "avx512_lowbit_registers.h"

namespace lutra {
namespace {

constexpr int32_t kTrits = 5;
constexpr int32_t kTritOutputs = 64;
// So many entries add up to a sum of 16 bits: an entry is -640..640, or -641 for a complement.
constexpr int32_t kTritTile = 32767 / 641;
constexpr size_t kTritTable = 256;  // bytes

inline int32_t trit_bytes(const LowBitShape& s) { return lowbit_ceil(s.group, kTrits); }
inline int32_t trit_blocks(const LowBitShape& s) { return lowbit_ceil(s.outputs, kTritOutputs); }
inline size_t trit_weight_bytes(const LowBitShape& s) {
  return static_cast<size_t>(trit_bytes(s)) * trit_blocks(s) * 64;
}
inline size_t trit_group_bytes(const LowBitShape& s) {
  return trit_weight_bytes(s) + static_cast<size_t>(trit_blocks(s)) * kTritOutputs * 4;
}

// The output of a byte: the first eight of each 128-bit lane are interleaved to a register of
// words, the others to another.
inline int32_t trit_output(int32_t byte) {
  const int32_t lane = byte / 16, place = byte % 16;
  return 32 * (place / 8) + 8 * lane + place % 8;
}

// To an int32.
inline void add_one(uint8_t* place) {
  int32_t value;
  __builtin_memcpy(&value, place, sizeof value);
  ++value;
  __builtin_memcpy(place, &value, sizeof value);
}

void pack_trits(const LowBitShape& s, const uint8_t* codes, uint8_t* packed) {
  const int32_t bytes = trit_bytes(s);
  for (int32_t from = 0; from < s.depth; from += s.group) {
    uint8_t* const negative = packed + trit_weight_bytes(s);  // of any alignment
    __builtin_memset(negative, 0, static_cast<size_t>(trit_blocks(s)) * kTritOutputs * 4);
    for (int32_t first = 0; first < bytes; first += kTritTile) {
      const int32_t last = first + kTritTile < bytes ? first + kTritTile : bytes;
      for (int32_t block = 0; block < s.outputs; block += kTritOutputs) {
        for (int32_t b = first; b < last; ++b) {
          for (int32_t i = 0; i < 64; ++i, ++packed) {
            const int32_t m = block + trit_output(i);
            int32_t v = 0;
            for (int32_t j = kTrits - 1; j >= 0; --j) {
              const int32_t k = kTrits * b + j;
              const bool there = m < s.outputs && k < s.group;
              v = 3 * v + (there ? codes[static_cast<size_t>(m) * s.depth + from + k] - 1 : 0);
            }
            *packed = static_cast<uint8_t>(v < 0 ? 128 - v : v);
            if (v < 0) add_one(negative + 4 * m);
          }
        }
      }
    }
    packed += static_cast<size_t>(trit_blocks(s)) * kTritOutputs * 4;
  }
}

// What the entries of a table are sums of. Entry n is part[low[n]] + part[high[n]]: of the first
// three activations, 27 sums, and of the last two, the five that come with an entry that is not
// negative, in places 27..31.
struct TritParts {
  int16_t digit[kTrits][32];    // of each part
  int16_t low[128], high[128];  // parts of each entry; those beyond 121 are of no use
};

constexpr TritParts trit_parts() {
  TritParts p{};
  for (int32_t i = 0; i < 27; ++i) {
    p.digit[0][i] = static_cast<int16_t>(i % 3 - 1);
    p.digit[1][i] = static_cast<int16_t>(i / 3 % 3 - 1);
    p.digit[2][i] = static_cast<int16_t>(i / 9 - 1);
  }
  for (int32_t i = 0; i < 5; ++i) {  // i = d + 3 e
    const int32_t d = (i + 1) % 3 - 1;
    p.digit[3][27 + i] = static_cast<int16_t>(d);
    p.digit[4][27 + i] = static_cast<int16_t>((i - d) / 3);
  }
  for (int32_t n = 0; n < 128; ++n) {
    p.low[n] = static_cast<int16_t>((n + 13) % 27);
    p.high[n] = static_cast<int16_t>(27 + (n < 122 ? (n + 13) / 27 : 0));
  }
  return p;
}
alignas(64) constexpr TritParts kTritParts = trit_parts();

LUTRA_INLINE __m512i trit_words(const int16_t* words) { return _mm512_loadu_si512(words); }

// The table of five activations: low bytes of 128 entries, then high ones.
LUTRA_INLINE void build_trit_table(const int8_t* x, uint8_t* table) {
  __m512i part = _mm512_setzero_si512();
#pragma GCC unroll 5
  for (int32_t j = 0; j < kTrits; ++j) {
    part = _mm512_add_epi16(
        part, _mm512_mullo_epi16(trit_words(kTritParts.digit[j]), _mm512_set1_epi16(x[j])));
  }
  __m512i entry[4];
#pragma GCC unroll 4
  for (int32_t i = 0; i < 4; ++i) {
    entry[i] =
        _mm512_add_epi16(_mm512_permutexvar_epi16(trit_words(kTritParts.low + 32 * i), part),
                         _mm512_permutexvar_epi16(trit_words(kTritParts.high + 32 * i), part));
  }
#pragma GCC unroll 2
  for (int32_t i = 0; i < 2; ++i) {
    const __m512i a = entry[2 * i], b = entry[2 * i + 1];
    const auto narrow = [](__m512i v, __m512i w) {
      return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(v)),
                                _mm512_cvtepi16_epi8(w), 1);
    };
    _mm512_store_si512(table + 64 * i, narrow(a, b));
    _mm512_store_si512(table + 128 + 64 * i,
                       narrow(_mm512_srai_epi16(a, 8), _mm512_srai_epi16(b, 8)));
  }
}

// One tile of bytes of a row: sums of kBlocks x 64 outputs, `next` bytes apart, from output m on.
struct TritSums {
  const uint8_t* negative;  // int32, of the group
  int32_t add;              // to every sum
  bool first;               // tile: sums are made, not added to
  int32_t from, to;         // outputs that are wanted
  int32_t* sums;            // of output `from`
};

template <int kBlocks>
LUTRA_INLINE void trit_step(int32_t bytes, const uint8_t* weights, size_t next,
                            const uint8_t* tables, int32_t m, const TritSums& t) {
  // Bit 7 of each byte into all bits of it.
  const __m512i spread = _mm512_set1_epi64(static_cast<int64_t>(0x8080808080808080ull));
  __m512i sum[2 * kBlocks];
#pragma GCC unroll 8
  for (int32_t i = 0; i < 2 * kBlocks; ++i) sum[i] = _mm512_setzero_si512();
  for (; bytes > 0; --bytes, weights += 64, tables += kTritTable) {
    const __m512i low0 = _mm512_load_si512(tables), low1 = _mm512_load_si512(tables + 64);
    const __m512i high0 = _mm512_load_si512(tables + 128);
    const __m512i high1 = _mm512_load_si512(tables + 192);
#pragma GCC unroll 4
    for (int32_t b = 0; b < kBlocks; ++b) {
      const __m512i i = _mm512_loadu_si512(weights + b * next);
      fetch_ahead(weights + b * next, kBlocks * next);  // of the next outputs
      const __m512i sign = _mm512_gf2p8affine_epi64_epi8(i, spread, 0);
      const __m512i low = _mm512_xor_si512(_mm512_permutex2var_epi8(low0, i, low1), sign);
      const __m512i high = _mm512_xor_si512(_mm512_permutex2var_epi8(high0, i, high1), sign);
      sum[2 * b] = _mm512_add_epi16(sum[2 * b], _mm512_unpacklo_epi8(low, high));
      sum[2 * b + 1] = _mm512_add_epi16(sum[2 * b + 1], _mm512_unpackhi_epi8(low, high));
      keep(sum[2 * b]);
      keep(sum[2 * b + 1]);
    }
  }
  const __m512i add = _mm512_set1_epi32(t.add);
#pragma GCC unroll 16
  for (int32_t i = 0; i < 4 * kBlocks; ++i) {
    const int32_t at = m + 16 * i;
    if (at < t.from || at >= t.to) continue;
    const __m512i words = sum[i / 2];
    const __m256i half =
        i % 2 == 0 ? _mm512_castsi512_si256(words) : _mm512_extracti64x4_epi64(words, 1);
    const __mmask16 mask = lane_mask(t.to - at);
    int32_t* const to = t.sums + (at - t.from);
    const __m512i before = t.first ? _mm512_add_epi32(add, _mm512_loadu_si512(t.negative + 4 * at))
                                   : _mm512_maskz_loadu_epi32(mask, to);
    _mm512_mask_storeu_epi32(to, mask, _mm512_add_epi32(before, _mm512_cvtepi16_epi32(half)));
  }
}

void lowbit_trits(const LowBitShape& s, const uint8_t* packed, int32_t group, const int8_t* x,
                  int32_t rows, int32_t first, int32_t last, int32_t* sums, size_t stride,
                  uint8_t* scratch) {
  packed += static_cast<size_t>(group) * trit_group_bytes(s);
  const int32_t bytes = trit_bytes(s), all = trit_blocks(s);
  const int32_t begin = first / kTritOutputs, end = lowbit_ceil(last, kTritOutputs);
  const int32_t padded = register_blocks(s) * 32;
  for (int32_t r = 0; r < rows; ++r, x += padded, sums += stride) {
    TritSums t{.negative = packed + trit_weight_bytes(s),
               .add = 0,
               .first = true,
               .from = first,
               .to = last,
               .sums = sums};
    for (int32_t k = 0; k < s.group; ++k) t.add += x[k];  // a code is a weight and one
    const uint8_t* tile = packed;
    for (int32_t b = 0; b < bytes; b += kTritTile) {
      const int32_t count = bytes - b < kTritTile ? bytes - b : kTritTile;
      for (int32_t i = 0; i < count; ++i) {
        const int32_t k = kTrits * (b + i);
        if (k + kTrits <= padded) {
          build_trit_table(x + k, scratch + i * kTritTable);
        } else {
          int8_t rest[kTrits] = {};
          for (int32_t j = 0; k + j < padded; ++j) rest[j] = x[k + j];
          build_trit_table(rest, scratch + i * kTritTable);
        }
      }
      const size_t next = static_cast<size_t>(count) * 64;
      const uint8_t* weights = tile + begin * next;
      int32_t block = begin;
      for (; end - block >= 4; block += 4, weights += 4 * next) {
        trit_step<4>(count, weights, next, scratch, block * kTritOutputs, t);
      }
      for (; block < end; ++block, weights += next) {
        trit_step<1>(count, weights, next, scratch, block * kTritOutputs, t);
      }
      tile += all * next;
      t.first = false;
    }
  }
}

// --- what few rows take: lookups of five weights where they are ternary, else of four bits ------

namespace lowbit_few {

size_t lowbit_register_bytes(const LowBitShape& s) {
  return s.levels == 3 ? static_cast<size_t>(s.depth / s.group) * trit_group_bytes(s)
                       : lutra::lowbit_register_bytes(s);
}

void pack_lowbit_registers(const LowBitShape& s, const uint8_t* codes, uint8_t* packed) {
  return s.levels == 3 ? pack_trits(s, codes, packed)
                       : lutra::pack_lowbit_registers(s, codes, packed);
}

size_t lowbit_register_scratch_bytes(const LowBitShape& s, int32_t rows) {
  return s.levels == 3 ? kTritTile * kTritTable : lutra::lowbit_register_scratch_bytes(s, rows);
}

void lowbit_registers(const LowBitShape& s, const uint8_t* packed, int32_t group, const int8_t* x,
                      int32_t rows, int32_t first, int32_t last, int32_t* sums, size_t stride,
                      uint8_t* scratch) {
  const auto kernel = s.levels == 3 ? lowbit_trits : lutra::lowbit_registers;
  kernel(s, packed, group, x, rows, first, last, sums, stride, scratch);
}

}  // namespace lowbit_few

}  // namespace
}  // namespace lutra
