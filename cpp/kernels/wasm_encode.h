// WebAssembly: codes of a tile, by nearest centroid or by tree. Private to wasm_kernels.h.
//
// Codes: block after block of 16 rows, each (codebooks, 16).
#pragma once

#include "wasm_distances.h"
#ifdef __wasm_relaxed_simd__
#include "wasm_dot_search16.h"
#else
#include "wasm_search16.h"
#endif

namespace lutra {
namespace {

LUTRA_INLINE size_t block_bytes(const PqShape& s) {
  return static_cast<size_t>(s.codebooks) * kBlock;
}
size_t code_bytes(const PqShape& s) { return block_bytes(s) * (kRows / kBlock); }

// --- nearest centroid ----------------------------------------------------------------------------
//
// Eight rows a register, in 16 bits, where centred.h says that the scores fit; else four rows, in
// 32 bits.
//
// A packed codebook, in words of 32 bits: 1 if narrow scores fit, then
//   16 bits: [4 centroids][initial score twice][4], and behind those of each four what
//            pack_narrow() makes of their entries
//   32 bits: [centroid][key | (c'_2i, c'_2i+1) for each pair i]

constexpr int32_t kKeyBits = 6;  // a 32-bit key is score * 64 + 63 - k: max finds the lowest best k

LUTRA_INLINE int32_t value_pairs(const PqShape& s) { return (s.dim + 1) / 2; }
LUTRA_INLINE size_t codebook_words(const PqShape& s) {
  return 1 + static_cast<size_t>(s.centroids) * (1 + static_cast<size_t>(s.dim));
}
LUTRA_INLINE int32_t tree_levels(const PqShape& s) { return 31 - __builtin_clz(s.centroids); }
LUTRA_INLINE size_t threshold_bytes(const PqShape& s) { return round_up(s.centroids, 16); }

size_t encoder_bytes(const PqShape& s) {
  if (s.encoder == Encoder::kNearest) {
    return s.distance == Distance::kL2 ? s.codebooks * codebook_words(s) * sizeof(int32_t)
                                       : apart_bytes(s);
  }
  return s.codebooks * (tree_levels(s) * 2 * sizeof(int32_t) + threshold_bytes(s));
}

LUTRA_COLD void pack_nearest(const PqShape& s, const uint8_t* centroids, uint8_t* packed) {
  if (s.distance != Distance::kL2) return pack_apart(s, centroids, packed);
  Centred codebook;
  for (int32_t b = 0; b < s.codebooks; ++b) {
    const int32_t left = s.depth - b * s.dim, valid = left < s.dim ? left : s.dim;
    centre(s, centroids + static_cast<size_t>(b) * s.centroids * s.dim, valid, &codebook);
    uint32_t* to = reinterpret_cast<uint32_t*>(packed) + b * codebook_words(s);
    *to++ = codebook.fits ? 1 : 0;
    for (int32_t k = 0; codebook.fits && k < s.centroids; k += 4) {
      for (int32_t j = k; j < k + 4; ++j) {
        *to++ = two_words(codebook.initial[j], codebook.initial[j]);
      }
      to = pack_narrow(codebook, k, s.dim, to);
    }
    for (int32_t k = 0; !codebook.fits && k < s.centroids; ++k) {
      const int32_t key = codebook.initial[k] * (1 << kKeyBits) + (1 << kKeyBits) - 1 - k;
      *to++ = static_cast<uint32_t>(key);
      for (int32_t v = 0; v < s.dim; v += 2) {
        *to++ = two_words(codebook.c[k][v], v + 1 < s.dim ? codebook.c[k][v + 1] : 0);
      }
    }
  }
}

// 16 words that fit a byte -> bytes.
LUTRA_INLINE v128_t narrow_words(const v128_t* v) {
  return wasm_u8x16_narrow_i16x8(wasm_i16x8_narrow_i32x4(v[0], v[1]),
                                 wasm_i16x8_narrow_i32x4(v[2], v[3]));
}

[[gnu::noinline]] v128_t search32(const uint32_t* codebook, int32_t dim, int32_t centroids,
                                  const Values* x) {
  v128_t pair[32][4];  // two entries of 4 rows
  const v128_t zero = zeros();
  for (int32_t v = 0; v < dim; v += 2) {
    for (int32_t h = 0; h < 2; ++h) {
      const v128_t a = x[v][h], b = v + 1 < dim ? x[v + 1][h] : zero;
      pair[v / 2][2 * h] = wasm_i16x8_shuffle(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
      pair[v / 2][2 * h + 1] = wasm_i16x8_shuffle(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    }
  }
  v128_t best[4];
  for (v128_t& b : best) b = wasm_i32x4_splat(INT32_MIN);
  for (int32_t k = 0; k < centroids; ++k) {
    const v128_t key = wasm_v128_load32_splat(codebook++);
    v128_t s[4] = {zero, zero, zero, zero};
    for (int32_t i = 0; i < (dim + 1) / 2; ++i) {
      const v128_t c = wasm_v128_load32_splat(codebook++);
#pragma GCC unroll 4
      for (int32_t q = 0; q < 4; ++q) {
        s[q] = wasm_i32x4_add(s[q], wasm_i32x4_dot_i16x8(pair[i][q], c));
      }
    }
#pragma GCC unroll 4
    for (int32_t q = 0; q < 4; ++q) {
      best[q] = wasm_i32x4_max(best[q], wasm_i32x4_add(wasm_i32x4_shl(s[q], kKeyBits), key));
    }
  }
  const v128_t low_bits = wasm_i32x4_splat((1 << kKeyBits) - 1);
  for (v128_t& b : best) b = wasm_v128_andnot(low_bits, b);  // 63 - (63 - k)
  return narrow_words(best);
}

void encode_nearest(const PqShape& s, const uint8_t* packed, const Patch& p, const Rows* rows,
                    int32_t first, int32_t last, uint8_t* codes) {
  Entries walk(p, s.taps, first * s.dim);
  const uint8_t* entries[64];
  for (int32_t b = first; b < last; ++b) {
    for (int32_t v = 0; v < s.dim; ++v) {
      entries[v] = b * s.dim + v < s.depth ? walk.next() : entries[0];  // or times zero
    }
    if (s.distance != Distance::kL2) {
      for (int32_t i = 0; i < blocks_of(p.rows); ++i) {
        store(codes + i * block_bytes(s) + b * kBlock,
              nearest_apart(s, packed, b, rows[i], entries));
      }
      continue;
    }
    const uint32_t* const codebook =
        reinterpret_cast<const uint32_t*>(packed) + b * codebook_words(s);
    const bool narrow = *codebook != 0;
    auto* const search = narrow ? search16 : search32;
    for (int32_t i = 0; i < blocks_of(p.rows); ++i) {
      Values x[64];
      with_rows(rows[i], [&](const auto& loader) {
        if (narrow) {
          load_narrow(loader, entries, s.dim, x);
        } else {
          load_values(loader, entries, s.dim, x);
        }
      });
      store(codes + i * block_bytes(s) + b * kBlock, search(codebook + 1, s.dim, s.centroids, x));
    }
  }
}

// --- tree ----------------------------------------------------------------------------------------
//
// The path is a node's number in the heap that begins with 1: path = 2 path + bit. It is the index
// of the node's threshold: one register holds those of levels 0..3, one level 4, two level 5.
//
// Packed: (codebooks, levels) pairs of the split's plane and tap, then (codebooks, 16 or K)
// thresholds in heap order, less 1: x >= t is x > t - 1, for which there is a signed comparison.

LUTRA_COLD void pack_tree(const PqShape& s, const int32_t* splits, const uint8_t* thresholds,
                          uint8_t* packed) {
  const int32_t count = s.codebooks * tree_levels(s);
  int32_t* const to = reinterpret_cast<int32_t*>(packed);
  for (int32_t i = 0; i < count; ++i) {
    to[2 * i] = splits[i] / s.taps;
    to[2 * i + 1] = splits[i] % s.taps;
  }
  int8_t* rest = reinterpret_cast<int8_t*>(to + 2 * count);
  for (int32_t b = 0; b < s.codebooks; ++b, thresholds += s.centroids - 1) {
    for (int32_t i = 0; i < static_cast<int32_t>(threshold_bytes(s)); ++i) {
      const int32_t t = i > 0 && i < s.centroids ? thresholds[i - 1] : 0;
      *rest++ = static_cast<int8_t>((t < 128 ? t : 128) - 1);
    }
  }
}

// The path behind the last level, which is the code plus K.
template <int kLevels, typename Loader>
LUTRA_INLINE v128_t descend(const Loader& rows, const uint8_t* const* at,
                            const uint8_t* thresholds) {
  v128_t path = wasm_i8x16_splat(1);
#pragma GCC unroll 6
  for (int32_t l = 0; l < kLevels; ++l) {
    v128_t t;
    if (l < 4) {
      t = wasm_i8x16_swizzle(load(thresholds), path);
    } else if (l == 4) {
      t = wasm_i8x16_swizzle(load(thresholds + 16), wasm_i8x16_sub(path, wasm_i8x16_splat(16)));
    } else {  // zeros where the index is not of a half
      t = wasm_v128_or(
          wasm_i8x16_swizzle(load(thresholds + 32), wasm_i8x16_sub(path, wasm_i8x16_splat(32))),
          wasm_i8x16_swizzle(load(thresholds + 48), wasm_i8x16_sub(path, wasm_i8x16_splat(48))));
    }
    path = wasm_i8x16_sub(wasm_i8x16_add(path, path), wasm_i8x16_gt(rows.load(at[l]), t));
  }
  return path;
}

constexpr int32_t kTreeBooks = 32;  // whose splits' addresses are found at a time

template <int kLevels>
void encode_tree(const PqShape& s, const uint8_t* packed, const Patch& p, const Rows* rows,
                 int32_t first, int32_t last, uint8_t* codes) {
  constexpr int32_t kCodes = 1 << kLevels, kBytes = kCodes < 16 ? 16 : kCodes;
  const int32_t* const splits = reinterpret_cast<const int32_t*>(packed);
  const uint8_t* const thresholds =
      packed + static_cast<size_t>(s.codebooks) * kLevels * 2 * sizeof(int32_t);
  const v128_t leaves = wasm_i8x16_splat(static_cast<int8_t>(kCodes));
  const uint8_t* at[kTreeBooks * kLevels];
  for (int32_t b = first; b < last; b += kTreeBooks) {
    const int32_t count = last - b < kTreeBooks ? last - b : kTreeBooks;
    for (int32_t i = 0; i < count * kLevels; ++i) {
      const int32_t* const split = splits + 2 * (b * kLevels + i);
      at[i] = p.planes + split[0] * p.plane + p.tap[split[1]];
    }
    for (int32_t i = 0; i < blocks_of(p.rows); ++i) {
      uint8_t* const to = codes + i * block_bytes(s) + b * kBlock;
      const uint8_t* const from = thresholds + b * threshold_bytes(s);
      with_rows(rows[i], [&](const auto& loader) {
        for (int32_t j = 0; j < count; ++j) {
          const v128_t path = descend<kLevels>(loader, at + j * kLevels, from + j * kBytes);
          store(to + j * kBlock, wasm_i8x16_sub(path, leaves));
        }
      });
    }
  }
}

void encode(const PqShape& s, const uint8_t* packed, const Patch& p, int32_t first, int32_t last,
            uint8_t* codes) {
  Rows rows[kRows / kBlock];
  for (int32_t i = 0; i < blocks_of(p.rows); ++i) find_rows(p, i * kBlock, &rows[i]);
  auto* const run = s.encoder == Encoder::kNearest ? encode_nearest
                    : s.centroids == 8             ? encode_tree<3>
                    : s.centroids == 16            ? encode_tree<4>
                    : s.centroids == 32            ? encode_tree<5>
                                                   : encode_tree<6>;
  run(s, packed, p, rows, first, last, codes);
}

void unpack_codes(const PqShape& s, const uint8_t* codes, int32_t rows, uint8_t* out,
                  size_t stride) {
  for (int32_t row = 0; row < rows; row += kBlock, codes += block_bytes(s)) {
    const int32_t count = rows - row < kBlock ? rows - row : kBlock;
    for (int32_t b = 0; b < s.codebooks; ++b) {
      store_bytes(out + b * stride + row, load(codes + b * kBlock), count);
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
    uint8_t* const to = codes + i * block_bytes(s);
    with_rows(rows, [&](const auto& loader) {
      Entries entries(p, s.parts, first);
      for (int32_t b = first; b < last; ++b) store(to + b * kBlock, loader.load(entries.next()));
    });
  }
}

}  // namespace
}  // namespace lutra
