// What the AVX2 kernels share: tiles and their sub-tiles, loads of a plane's values, the epilogue.
// Private to avx2.cc: everything is in its anonymous namespace.
#pragma once

#include <immintrin.h>

#include "kernels.h"

#define LUTRA_INLINE [[gnu::always_inline]] inline

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

LUTRA_INLINE int32_t round_up(int32_t n, int32_t unit) { return (n + unit - 1) / unit * unit; }
LUTRA_INLINE bool narrow(int32_t rows_left) { return rows_left <= kRowBlock; }

// The values of up to 32 rows of any plane. Consecutive rows are a plain load. Others are covered
// by windows of 16 bytes, each beginning at a row that no window before it reaches: a byte shuffle
// puts a window's values in their places and zeros elsewhere. The two halves of 16 rows have
// windows of their own. Maps that are not tiny need two windows, and one more where images meet.
struct Rows {
  bool whole;
  int32_t windows;
  int32_t offset[16][2];
  alignas(32) uint8_t index[16][kSubRows];

  LUTRA_INLINE __m256i wide(const uint8_t* plane) const {
    if (whole) return load(plane + offset[0][0]);
    __m256i v = window(plane, 0);
    for (int32_t i = 1; i < windows; ++i) v = _mm256_or_si256(v, window(plane, i));
    return v;
  }
  LUTRA_INLINE __m128i half(const uint8_t* plane) const {
    if (whole) return load_half(plane + offset[0][0]);
    __m128i v = _mm_setzero_si128();
    for (int32_t i = 0; i < windows; ++i) {
      const __m128i bytes = load_half(plane + offset[i][0]);
      v = _mm_or_si128(v, _mm_shuffle_epi8(bytes, load_half(index[i])));
    }
    return v;
  }

 private:
  LUTRA_INLINE __m256i window(const uint8_t* plane, int32_t i) const {
    const __m256i bytes = join(load_half(plane + offset[i][0]), load_half(plane + offset[i][1]));
    return _mm256_shuffle_epi8(bytes, load(index[i]));
  }
};

[[gnu::noinline]] void find_rows(const Patch& p, int32_t first, Rows* rows) {
  const int32_t* const row = p.row + first;
  const int32_t valid = p.rows - first < kSubRows ? p.rows - first : kSubRows;
  rows->whole = p.consecutive;
  if (!rows->whole) {
    rows->whole = true;
    for (int32_t r = 1; r < valid && rows->whole; ++r) rows->whole = row[r] == row[0] + r;
  }
  rows->windows = 1;
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
  rows->windows = count[0] > count[1] ? count[0] : count[1];
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

// The quotient, before the zero is added. Only the upper end is clamped here (min returns its
// second operand for NaN), and once before the correction, whose remainder would be inf - inf.
// The lower end is the packing's: what is below, -inf and NaN become INT32_MIN or so, and then 0.
LUTRA_INLINE __m256i quotient(__m256 x, const Grid& g) {
  const __m256 high = _mm256_set1_ps(static_cast<float>(g.qmax - g.zero));
  __m256 t;
  if (g.inverse != 0.0f) {
    const __m256 inverse = _mm256_set1_ps(g.inverse);
    t = _mm256_min_ps(_mm256_set1_ps(static_cast<float>(g.qmax - g.zero + 1)),
                      _mm256_mul_ps(x, inverse));
    t = _mm256_fmadd_ps(_mm256_fnmadd_ps(t, _mm256_set1_ps(g.scale), x), inverse, t);
  } else {
    t = _mm256_div_ps(x, _mm256_set1_ps(g.scale));
  }
  return _mm256_cvtps_epi32(_mm256_min_ps(high, t));
}

LUTRA_INLINE __m128i to_grid(__m256 x0, __m256 x1, const Grid& g) {  // 16 values
  const __m256i q = _mm256_packs_epi32(quotient(x0, g), quotient(x1, g));
  const __m256i words = _mm256_adds_epi16(_mm256_permute4x64_epi64(q, 0xd8),
                                          _mm256_set1_epi16(static_cast<int16_t>(g.zero)));
  return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

// The epilogue of 16 rows of one output, in registers. A copy of the contract's, so that no store
// can change it, with the clamp dropped where a grid clamps to the same.
struct Finish {
  Epilogue e;

  LUTRA_INLINE explicit Finish(const Epilogue& epilogue) : e(epilogue) {
    if (!e.clamp || e.out || e.low != 0.0f || e.high != __builtin_inff()) return;
    bool implied = true;
    for (int32_t i = 0; i < e.quantized; ++i) implied = implied && e.q[i].grid.zero == 0;
    if (implied) e.clamp = false;
  }

  // The sums are those given and `base`.
  LUTRA_INLINE void sums(int32_t m, int32_t row, int32_t base, __m256i s0, __m256i s1) const {
    const __m256i offset = _mm256_set1_epi32(e.offset ? base + e.offset[m] : base);
    sums(m, row, _mm256_cvtepi32_ps(_mm256_add_epi32(s0, offset)),
         _mm256_cvtepi32_ps(_mm256_add_epi32(s1, offset)));
  }

  LUTRA_INLINE void sums(int32_t m, int32_t row, __m256 y0, __m256 y1) const {
    const int32_t left = e.rows - row;
    if (left >= 16) {
      finish<true>(m, row, y0, y1, 16);
    } else if (left > 0) {
      finish<false>(m, row, y0, y1, left);
    }
  }

 private:
  template <bool kWhole>
  LUTRA_INLINE static __m256 read(const float* p, __m256i mask) {
    return kWhole ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, mask);
  }
  template <bool kWhole>
  LUTRA_INLINE static void write(float* p, __m256i mask, __m256 y) {
    kWhole ? _mm256_storeu_ps(p, y) : _mm256_maskstore_ps(p, mask, y);
  }

  template <bool kWhole>
  LUTRA_INLINE void finish(int32_t m, int32_t row, __m256 y0, __m256 y1, int32_t count) const {
    __m256i mask0 = _mm256_setzero_si256(), mask1 = mask0;
    if (!kWhole) {
      const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      mask0 = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
      mask1 = _mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8), lane);
    }
    if (e.scale) {
      const __m256 scale = _mm256_set1_ps(e.scale[m]);
      y0 = _mm256_mul_ps(y0, scale);
      y1 = _mm256_mul_ps(y1, scale);
    }
    const __m256 bias = _mm256_set1_ps(e.bias[m]);
    y0 = _mm256_add_ps(y0, bias);
    y1 = _mm256_add_ps(y1, bias);
    if (e.residual) {
      const float* const from = e.residual + m * e.residual_stride + row;
      y0 = _mm256_add_ps(y0, read<kWhole>(from, mask0));
      y1 = _mm256_add_ps(y1, read<kWhole>(from + 8, mask1));
    }
    if (e.clamp) {
      const __m256 low = _mm256_set1_ps(e.low), high = _mm256_set1_ps(e.high);
      y0 = _mm256_max_ps(y0, low);  // returns its second operand for NaN
      y1 = _mm256_max_ps(y1, low);
      y0 = _mm256_min_ps(y0, high);
      y1 = _mm256_min_ps(y1, high);
    }
    if (e.out) {
      float* const to = e.out + m * e.out_stride + row;
      write<kWhole>(to, mask0, y0);
      write<kWhole>(to + 8, mask1, y1);
    }
    for (int32_t i = 0; i < e.quantized; ++i) {
      uint8_t* const to = e.q[i].out + m * e.q[i].stride + row;
      store_bytes(to, to_grid(y0, y1, e.q[i].grid), kWhole ? 16 : count);
    }
  }
};

}  // namespace
}  // namespace lutra
