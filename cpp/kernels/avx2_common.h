// What the AVX2 kernels share: tiles and their sub-tiles, loads of a plane's values, the epilogue.
// Private to avx2.cc: everything is in its anonymous namespace.
#pragma once

#include <immintrin.h>

#include "kernels.h"

#define LUTRA_INLINE [[gnu::always_inline]] inline
#define LUTRA_UNROLL _Pragma("GCC unroll 4")  // arrays stay in registers

namespace lutra {
namespace {

constexpr int32_t kRows = 64;     // rows of a tile: sub-tiles of 32 rows, the last of 16 where that
constexpr int32_t kSubRows = 32;  // is enough ("narrow": the 128-bit lanes hold two codebooks)
constexpr int32_t kBlock = 4;     // outputs per block of packed tables

LUTRA_INLINE __m256i load(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
LUTRA_INLINE __m128i load_half(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
LUTRA_INLINE void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
LUTRA_INLINE void store_half(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
LUTRA_INLINE __m256i join(__m128i low, __m128i high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
LUTRA_INLINE __m256i broadcast_half(const void* p) {
  return _mm256_broadcastsi128_si256(load_half(p));
}
LUTRA_INLINE __m256i broadcast_word(const void* p) {  // a load: no shuffle port
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return _mm256_set1_epi32(word);
}

// Nothing, but not for the compiler, which otherwise reorders long sums for which there are no
// registers then.
LUTRA_INLINE void keep(__m256i& v) { __asm__("" : "+x"(v)); }

LUTRA_INLINE int32_t round_up(int32_t n, int32_t unit) { return (n + unit - 1) / unit * unit; }
LUTRA_INLINE bool narrow(int32_t rows_left) { return rows_left <= kRowBlock; }

// How to load the values of a sub-tile's rows from any plane. Consecutive rows are a plain load.
// Others are covered by windows of 16 bytes, each beginning at a row that no window before it
// reaches: a byte shuffle puts a window's values in their places and zeros elsewhere. The two
// halves of 16 rows have windows of their own. Maps that are not tiny need two windows, and one
// more where images meet.
struct Rows {
  bool whole;
  int32_t windows;  // at least 2, unless whole
  int32_t offset[16][2];
  alignas(32) uint8_t index[16][kSubRows];
};

struct WholeRows {
  int32_t offset;
  LUTRA_INLINE explicit WholeRows(const Rows& r) : offset(r.offset[0][0]) {}
  LUTRA_INLINE __m256i wide(const uint8_t* plane) const { return load(plane + offset); }
  LUTRA_INLINE __m128i half(const uint8_t* plane) const { return load_half(plane + offset); }
};

template <bool kTwo>
struct WindowRows {
  const Rows& rows;
  __m256i index[2];
  LUTRA_INLINE explicit WindowRows(const Rows& r)
      : rows(r), index{load(r.index[0]), load(r.index[1])} {}
  LUTRA_INLINE __m256i wide(const uint8_t* plane) const {
    __m256i v = _mm256_or_si256(_mm256_shuffle_epi8(window(plane, 0), index[0]),
                                _mm256_shuffle_epi8(window(plane, 1), index[1]));
    for (int32_t i = 2; !kTwo && i < rows.windows; ++i) {
      const __m256i part = _mm256_shuffle_epi8(window(plane, i), load(rows.index[i]));
      v = _mm256_or_si256(v, part);
    }
    return v;
  }
  LUTRA_INLINE __m128i half(const uint8_t* plane) const {
    __m128i v = _mm_setzero_si128();
    for (int32_t i = 0; i < (kTwo ? 2 : rows.windows); ++i) {
      const __m128i at = i < 2 ? _mm256_castsi256_si128(index[i]) : load_half(rows.index[i]);
      v = _mm_or_si128(v, _mm_shuffle_epi8(load_half(plane + rows.offset[i][0]), at));
    }
    return v;
  }

 private:
  LUTRA_INLINE __m256i window(const uint8_t* plane, int32_t i) const {
    return join(load_half(plane + rows.offset[i][0]), load_half(plane + rows.offset[i][1]));
  }
};

template <typename Body>
LUTRA_INLINE void with_rows(const Rows& rows, const Body& body) {
  if (rows.whole) {
    body(WholeRows(rows));
  } else if (rows.windows == 2) {
    body(WindowRows<true>(rows));
  } else {
    body(WindowRows<false>(rows));
  }
}

[[gnu::noinline]] void find_rows(const Patch& p, int32_t first, Rows* rows) {
  const int32_t* const row = p.row + first;
  const int32_t valid = p.rows - first < kSubRows ? p.rows - first : kSubRows;
  rows->whole = p.consecutive;
  if (!rows->whole) {
    rows->whole = true;
    for (int32_t r = 1; r < valid && rows->whole; ++r) rows->whole = row[r] == row[0] + r;
  }
  rows->offset[0][0] = row[0];
  if (rows->whole) return;
  int32_t count[2] = {0, 0};
  for (int32_t h = 0; h < (narrow(valid) ? 1 : 2); ++h) {
    int32_t* const n = &count[h];
    for (int32_t r = 16 * h; r < 16 * h + 16; ++r) {
      if (*n == 0 || row[r] - rows->offset[*n - 1][h] >= 16) {
        store_half(rows->index[*n] + 16 * h, _mm_set1_epi8(-128));
        rows->offset[(*n)++][h] = row[r];
      }
      rows->index[*n - 1][r] = static_cast<uint8_t>(row[r] - rows->offset[*n - 1][h]);
    }
  }
  rows->windows = 2;
  for (const int32_t n : count) rows->windows = n > rows->windows ? n : rows->windows;
  for (int32_t h = 0; h < 2; ++h) {
    for (int32_t i = count[h]; i < rows->windows; ++i) {
      store_half(rows->index[i] + 16 * h, _mm_set1_epi8(-128));
      rows->offset[i][h] = row[0];
    }
  }
}

// Walks the addresses of entries d, d + 1, ...
struct Entries {
  const Patch& p;
  int32_t taps, tap;
  const uint8_t* plane;

  LUTRA_INLINE Entries(const Patch& patch, int32_t taps_per_plane, int32_t d)
      : p(patch), taps(taps_per_plane), tap(d % taps), plane(p.planes + (d / taps) * p.plane) {}
  LUTRA_INLINE const uint8_t* next() {
    const uint8_t* const at = plane + p.tap[tap];
    if (++tap == taps) {
      tap = 0;
      plane += p.plane;
    }
    return at;
  }
};

// --- grids and the epilogue ----------------------------------------------------------------------

LUTRA_INLINE void store_bytes(uint8_t* to, __m128i v, int32_t count) {
  if (count >= 16) return store_half(to, v);
  if (count & 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), v);
    v = _mm_srli_si128(v, 8);
    to += 8;
  }
  uint64_t rest = static_cast<uint64_t>(_mm_cvtsi128_si64(v));
  for (int32_t i = 0; i < (count & 7); ++i, rest >>= 8) to[i] = static_cast<uint8_t>(rest);
}

struct GridVectors {
  __m256 scale, inverse, high, above;
  __m256i zero;
  bool divide;

  GridVectors() = default;
  LUTRA_INLINE explicit GridVectors(const Grid& g)
      : scale(_mm256_set1_ps(g.scale)),
        inverse(_mm256_set1_ps(g.inverse)),
        high(_mm256_set1_ps(static_cast<float>(g.qmax - g.zero))),
        above(_mm256_set1_ps(static_cast<float>(g.qmax - g.zero + 1))),
        zero(_mm256_set1_epi16(static_cast<int16_t>(g.zero))),
        divide(g.inverse == 0.0f) {}
};

// x / scale, of which only what is below the upper end need be exact. min returns its second
// operand for NaN. The clamp keeps the remainder of the correction from being inf - inf there;
// below, NaN and -inf come to the same.
LUTRA_INLINE __m256 quotient(__m256 x, const GridVectors& g) {
  if (g.divide) return _mm256_div_ps(x, g.scale);
  const __m256 t = _mm256_min_ps(g.above, _mm256_mul_ps(x, g.inverse));
  return _mm256_fmadd_ps(_mm256_fnmadd_ps(t, g.scale, x), g.inverse, t);
}

// Quotients -> bytes of the grid. There is no lower clamp: what is too low becomes negative
// (INT32_MIN for NaN), and the packing saturates.
LUTRA_INLINE __m256i grid_words(__m256 t0, __m256 t1, const GridVectors& g) {  // 4 of each a lane
  const __m256i q = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_min_ps(g.high, t0)),
                                       _mm256_cvtps_epi32(_mm256_min_ps(g.high, t1)));
  return _mm256_adds_epi16(q, g.zero);
}
LUTRA_INLINE __m128i grid_bytes(__m256 t0, __m256 t1, const GridVectors& g) {
  const __m256i w = _mm256_permute4x64_epi64(grid_words(t0, t1, g), 0xd8);
  return _mm_packus_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
}
LUTRA_INLINE __m256i grid_bytes(const __m256* t, const GridVectors& g) {
  const __m256i bytes = _mm256_packus_epi16(grid_words(t[0], t[1], g), grid_words(t[2], t[3], g));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// The epilogue of one output, 16 or 32 rows in registers. A copy of the contract's, so that no
// store can change it, with the clamp dropped where a grid clamps to the same.
struct Finish {
  Epilogue e;
  GridVectors grid[kMaxQuantized];

  LUTRA_INLINE explicit Finish(const Epilogue& epilogue) : e(epilogue) {
    for (int32_t i = 0; i < e.quantized; ++i) grid[i] = GridVectors(e.q[i].grid);
    if (!e.clamp || e.out || e.low != 0.0f || e.high != __builtin_inff()) return;
    bool implied = true;
    for (int32_t i = 0; i < e.quantized; ++i) implied = implied && e.q[i].grid.zero == 0;
    if (implied) e.clamp = false;
  }

  LUTRA_INLINE bool folds(int32_t m) const {
    return e.fold_scale && e.fold_scale[m] == e.fold_scale[m];
  }

  // kRegisters times 8 rows from `row`; the sums are those given and `base`.
  template <int kRegisters>
  LUTRA_INLINE void sums(int32_t m, int32_t row, int32_t base, const __m256i* s) const {
    __m256 y[kRegisters];
    const __m256i offset = _mm256_set1_epi32(e.offset ? base + e.offset[m] : base);
    LUTRA_UNROLL for (int32_t i = 0; i < kRegisters; ++i) {
      y[i] = _mm256_cvtepi32_ps(_mm256_add_epi32(s[i], offset));
    }
    if (folds(m)) {
      fold<kRegisters>(m, row, y);
    } else {
      sums<kRegisters>(m, row, y);
    }
  }

  template <int kRegisters>
  LUTRA_INLINE void sums(int32_t m, int32_t row, const __m256* y) const {
    const int32_t left = e.rows - row;
    if (left >= 8 * kRegisters) return finish<kRegisters, true>(m, row, y, left);
    LUTRA_UNROLL for (int32_t i = 0; i < kRegisters; i += 2) {
      if (left > 8 * i) finish<2, false>(m, row + 8 * i, y + i, left - 8 * i);
    }
  }

 private:
  template <int kRegisters>
  LUTRA_INLINE void quantize(int32_t n, int32_t m, int32_t row, const __m256* t) const {
    uint8_t* const to = e.q[n].out + m * e.q[n].stride + row;
    const int32_t left = e.rows - row;
    if constexpr (kRegisters == 4) {
      const __m256i bytes = grid_bytes(t, grid[n]);
      if (left >= 32) return store(to, bytes);
      store_bytes(to, _mm256_castsi256_si128(bytes), left);
      if (left > 16) store_bytes(to + 16, _mm256_extracti128_si256(bytes, 1), left - 16);
    } else {
      store_bytes(to, grid_bytes(t[0], t[1], grid[n]), left);
    }
  }

  template <int kRegisters>
  LUTRA_INLINE void fold(int32_t m, int32_t row, const __m256* y) const {
    const __m256 scale = _mm256_set1_ps(e.fold_scale[m]), bias = _mm256_set1_ps(e.fold_bias[m]);
    __m256 t[kRegisters];
    LUTRA_UNROLL for (int32_t i = 0; i < kRegisters; ++i) {
      t[i] = _mm256_fmadd_ps(y[i], scale, bias);
    }
    quantize<kRegisters>(0, m, row, t);
  }

  template <int kRegisters, bool kWhole>
  LUTRA_INLINE void finish(int32_t m, int32_t row, const __m256* sums, int32_t count) const {
    __m256 y[kRegisters];
    __m256i mask[kRegisters];
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    LUTRA_UNROLL for (int32_t i = 0; i < kRegisters; ++i) {
      y[i] = sums[i];
      if (!kWhole) mask[i] = _mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8 * i), lane);
    }
    if (e.scale) {
      const __m256 scale = _mm256_set1_ps(e.scale[m]);
      LUTRA_UNROLL for (int32_t i = 0; i < kRegisters; ++i) y[i] = _mm256_mul_ps(y[i], scale);
    }
    const __m256 bias = _mm256_set1_ps(e.bias[m]);
    LUTRA_UNROLL for (int32_t i = 0; i < kRegisters; ++i) y[i] = _mm256_add_ps(y[i], bias);
    if (e.residual) {
      const float* const from = e.residual + m * e.residual_stride + row;
      LUTRA_UNROLL for (int32_t i = 0; i < kRegisters; ++i) {
        const __m256 r =
            kWhole ? _mm256_loadu_ps(from + 8 * i) : _mm256_maskload_ps(from + 8 * i, mask[i]);
        y[i] = _mm256_add_ps(y[i], r);
      }
    }
    if (e.clamp) {
      const __m256 low = _mm256_set1_ps(e.low), high = _mm256_set1_ps(e.high);
      LUTRA_UNROLL for (int32_t i = 0; i < kRegisters; ++i) {
        y[i] = _mm256_min_ps(_mm256_max_ps(y[i], low), high);  // max gives its second for NaN
      }
    }
    if (e.out) {
      float* const to = e.out + m * e.out_stride + row;
      LUTRA_UNROLL for (int32_t i = 0; i < kRegisters; ++i) {
        if (kWhole) {
          _mm256_storeu_ps(to + 8 * i, y[i]);
        } else {
          _mm256_maskstore_ps(to + 8 * i, mask[i], y[i]);
        }
      }
    }
    for (int32_t n = 0; n < e.quantized; ++n) {
      __m256 t[kRegisters];
      LUTRA_UNROLL for (int32_t i = 0; i < kRegisters; ++i) t[i] = quotient(y[i], grid[n]);
      quantize<kRegisters>(n, m, row, t);
    }
  }
};

}  // namespace
}  // namespace lutra
