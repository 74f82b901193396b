// NEON: codes of a tile, by nearest centroid or by tree. Private to neon.cc and neon_dot.cc.
//
// Codes: block after block of 16 rows. Of up to 16 centroids two codebooks are read by one tbl
// (neon_lookup.h), so their codes are pairs, [pair of codebooks][row][2], the second of them plus
// K. Of more centroids they are [codebook][row].
#pragma once

#include "neon_distances.h"
#ifdef __ARM_FEATURE_DOTPROD
#include "neon_dot_nearest.h"
#else
#include "neon_nearest.h"
#endif

namespace lutra {
namespace {

LUTRA_INLINE bool code_pairs(const PqShape& s) { return s.centroids <= 16; }
LUTRA_INLINE size_t block_bytes(const PqShape& s) {
  return static_cast<size_t>(round_up(s.codebooks, 2)) * kBlock;
}
size_t code_bytes(const PqShape& s) { return block_bytes(s) * (kRows / kBlock); }

// Codes of codebooks b and b + 1; of the second one plus K.
LUTRA_INLINE void store_pair(uint8_t* block, int32_t b, uint8x16_t first, uint8x16_t second) {
  vst1q_u8(block + b * kBlock, vzip1q_u8(first, second));
  vst1q_u8(block + (b + 1) * kBlock, vzip2q_u8(first, second));
}

// code(b) of all codebooks of a block. Where the last one has no partner, the partner's code is 0.
template <class F>
LUTRA_INLINE void store_codes(const PqShape& s, uint8_t* block, int32_t first, int32_t last,
                              const F& code) {
  if (!code_pairs(s)) {
    for (int32_t b = first; b < last; ++b) vst1q_u8(block + b * kBlock, code(b));
    return;
  }
  const uint8x16_t plus = vdupq_n_u8(static_cast<uint8_t>(s.centroids));
  for (int32_t b = first; b < last; b += 2) {
    const uint8x16_t low = code(b);
    store_pair(block, b, low, b + 1 < last ? vaddq_u8(code(b + 1), plus) : plus);
  }
}

void pack_centroids(const PqShape& s, const uint8_t* centroids, uint8_t* packed) {
  (s.distance == Distance::kL2 ? pack_nearest : pack_apart)(s, centroids, packed);
}

void encode_nearest(const PqShape& s, const uint8_t* packed, const Patch& p, const Rows& rows,
                    int32_t first, int32_t last, uint8_t* block) {
  Entries walk(p, s.taps, first * s.dim);
  const uint8_t* entries[64];
  store_codes(s, block, first, last, [&](int32_t b) {
    for (int32_t v = 0; v < s.dim; ++v) {
      entries[v] = b * s.dim + v < s.depth ? walk.next() : entries[0];  // or times zero
    }
    return s.distance == Distance::kL2 ? nearest(s, packed, b, rows, entries)
                                       : nearest_apart(s, packed, b, rows, entries);
  });
}

// --- tree ----------------------------------------------------------------------------------------
//
// The path is a node's number in the heap that begins with 1: path = 2 path + bit. It is the index
// of the node's threshold: one register holds those of levels 0..3, one level 4, two level 5.
//
// Packed: (codebooks, levels) pairs of the split's plane and tap, then (codebooks, 16 or K)
// thresholds in heap order.

LUTRA_INLINE int32_t tree_levels(const PqShape& s) { return 31 - __builtin_clz(s.centroids); }
LUTRA_INLINE size_t threshold_bytes(const PqShape& s) { return round_up(s.centroids, 16); }

size_t encoder_bytes(const PqShape& s) {
  if (s.encoder == Encoder::kNearest) {
    return s.distance == Distance::kL2 ? nearest_bytes(s) : apart_bytes(s);
  }
  return s.codebooks * (tree_levels(s) * 2 * sizeof(int32_t) + threshold_bytes(s));
}

void pack_tree(const PqShape& s, const int32_t* splits, const uint8_t* thresholds,
               uint8_t* packed) {
  const int32_t count = s.codebooks * tree_levels(s);
  int32_t* const to = reinterpret_cast<int32_t*>(packed);
  for (int32_t i = 0; i < count; ++i) {
    to[2 * i] = splits[i] / s.taps;
    to[2 * i + 1] = splits[i] % s.taps;
  }
  uint8_t* rest = reinterpret_cast<uint8_t*>(to + 2 * count);
  for (int32_t b = 0; b < s.codebooks; ++b, thresholds += s.centroids - 1) {
    for (int32_t i = 0; i < static_cast<int32_t>(threshold_bytes(s)); ++i) {
      *rest++ = i > 0 && i < s.centroids ? thresholds[i - 1] : uint8_t{0};
    }
  }
}

// The path behind the last level, which is the code plus K.
template <int kLevels, typename Loader>
LUTRA_INLINE uint8x16_t descend(const Loader& rows, const uint8_t* const* at,
                                const uint8_t* thresholds) {
  uint8x16_t path = vdupq_n_u8(1);
#pragma GCC unroll 6
  for (int32_t l = 0; l < kLevels; ++l) {
    uint8x16_t t;
    if (l < 4) {
      t = vqtbl1q_u8(vld1q_u8(thresholds), path);
    } else if (l == 4) {
      t = vqtbl1q_u8(vld1q_u8(thresholds + 16), vsubq_u8(path, vdupq_n_u8(16)));
    } else {
      const uint8x16x2_t two = {{vld1q_u8(thresholds + 32), vld1q_u8(thresholds + 48)}};
      t = vqtbl2q_u8(two, vsubq_u8(path, vdupq_n_u8(32)));
    }
    path = vsubq_u8(vaddq_u8(path, path), vcgeq_u8(rows.load(at[l]), t));
  }
  return path;
}

constexpr int32_t kTreeBooks = 32;  // whose splits' addresses are found at a time

// at: (codebooks, levels) addresses of the splits of codebooks first..last-1
template <int kLevels, typename Loader>
LUTRA_INLINE void tree_block(const PqShape& s, const Loader& rows, const uint8_t* const* at,
                             const uint8_t* thresholds, int32_t first, int32_t last,
                             uint8_t* block) {
  constexpr int32_t kCodes = 1 << kLevels, kBytes = kCodes < 16 ? 16 : kCodes;
  const uint8x16_t plus = vdupq_n_u8(static_cast<uint8_t>(kCodes));
  int32_t b = first;
  for (; b + 2 <= last; b += 2, at += 2 * kLevels, thresholds += 2 * kBytes) {
    const uint8x16_t one = descend<kLevels>(rows, at, thresholds);
    const uint8x16_t two = descend<kLevels>(rows, at + kLevels, thresholds + kBytes);
    if constexpr (kCodes <= 16) {
      store_pair(block, b, vsubq_u8(one, plus), two);
    } else {
      vst1q_u8(block + b * kBlock, vsubq_u8(one, plus));
      vst1q_u8(block + (b + 1) * kBlock, vsubq_u8(two, plus));
    }
  }
  if (b == last) return;
  const uint8x16_t code = vsubq_u8(descend<kLevels>(rows, at, thresholds), plus);
  if (code_pairs(s)) {
    store_pair(block, b, code, plus);
  } else {
    vst1q_u8(block + b * kBlock, code);
  }
}

template <int kLevels>
void encode_tree(const PqShape& s, const uint8_t* packed, const Patch& p, const Rows* rows,
                 int32_t first, int32_t last, uint8_t* codes) {
  const int32_t* const splits = reinterpret_cast<const int32_t*>(packed);
  const uint8_t* const thresholds =
      packed + static_cast<size_t>(s.codebooks) * kLevels * 2 * sizeof(int32_t);
  const uint8_t* at[kTreeBooks * kLevels];
  for (int32_t b = first; b < last; b += kTreeBooks) {
    const int32_t end = last - b < kTreeBooks ? last : b + kTreeBooks;
    for (int32_t i = 0; i < (end - b) * kLevels; ++i) {
      const int32_t* const split = splits + 2 * (b * kLevels + i);
      at[i] = p.planes + split[0] * p.plane + p.tap[split[1]];
    }
    const uint8_t* const from = thresholds + b * threshold_bytes(s);
    for (int32_t i = 0; i < blocks_of(p.rows); ++i) {
      with_rows(rows[i], [&](const auto& loader) {
        tree_block<kLevels>(s, loader, at, from, b, end, codes + i * block_bytes(s));
      });
    }
  }
}

void encode(const PqShape& s, const uint8_t* packed, const Patch& p, int32_t first, int32_t last,
            uint8_t* codes) {
  Rows rows[kRows / kBlock];
  for (int32_t i = 0; i < blocks_of(p.rows); ++i) find_rows(p, i * kBlock, &rows[i]);
  if (s.encoder == Encoder::kNearest) {
    for (int32_t i = 0; i < blocks_of(p.rows); ++i) {
      encode_nearest(s, packed, p, rows[i], first, last, codes + i * block_bytes(s));
    }
    return;
  }
  auto* const run = s.centroids == 8    ? encode_tree<3>
                    : s.centroids == 16 ? encode_tree<4>
                    : s.centroids == 32 ? encode_tree<5>
                                        : encode_tree<6>;
  run(s, packed, p, rows, first, last, codes);
}

void unpack_codes(const PqShape& s, const uint8_t* codes, int32_t rows, uint8_t* out,
                  size_t stride) {
  for (int32_t row = 0; row < rows; row += kBlock, codes += block_bytes(s)) {
    const int32_t count = rows - row < kBlock ? rows - row : kBlock;
    for (int32_t b = 0; b < s.codebooks; ++b) {
      uint8_t* const to = out + b * stride + row;
      if (!code_pairs(s)) {
        store_bytes(to, vld1q_u8(codes + b * kBlock), count);
        continue;
      }
      const uint8_t* const pair = codes + b / 2 * (2 * kBlock);
      const uint8x16_t low = vld1q_u8(pair), high = vld1q_u8(pair + kBlock);
      const uint8x16_t code = b % 2 == 0 ? vuzp1q_u8(low, high) : vuzp2q_u8(low, high);
      store_bytes(to, vandq_u8(code, vdupq_n_u8(static_cast<uint8_t>(s.centroids - 1))), count);
    }
  }
}

int32_t code_unit(const PqShape&) { return 1; }

void unpack_units(const PqShape& s, const uint8_t* codes, int32_t rows, uint8_t* out,
                  size_t stride) {
  unpack_codes(s, codes, rows, out, stride);
}

void gather_codes(const PqShape& s, const Patch& p, int32_t first, int32_t last, uint8_t* codes) {
  for (int32_t i = 0; i < blocks_of(p.rows); ++i) {
    Rows rows;
    find_rows(p, i * kBlock, &rows);
    with_rows(rows, [&](const auto& loader) {
      Entries entries(p, s.parts, first);
      store_codes(s, codes + i * block_bytes(s), first, last,
                  [&](int32_t) { return loader.load(entries.next()); });
    });
  }
}

}  // namespace
}  // namespace lutra
