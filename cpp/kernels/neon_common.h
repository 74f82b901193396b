// What the NEON kernels share: tiles and their blocks, loads of a plane's values, the epilogue.
// Private to neon.cc and neon_dot.cc: everything is in the anonymous namespace of each.
#pragma once

#include <arm_neon.h>

#include "kernels.h"

#define LUTRA_INLINE [[gnu::always_inline]] inline

namespace lutra {
namespace {

constexpr int32_t kRows = 64;    // rows of a tile, in blocks of 16: a register of bytes
constexpr int32_t kBlock = 16;   // rows of a block
constexpr int32_t kOutputs = 4;  // outputs of a block of packed tables or weights

// Lanes that intrinsics want as constants: a fold expression calls a function for each of them.
// (Not the intrinsic itself, which is a macro in Clang.)
template <int... kLane>
struct Lanes {};
using FourLanes = Lanes<0, 1, 2, 3>;
using EightLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;

LUTRA_INLINE int32_t round_up(int32_t n, int32_t unit) { return (n + unit - 1) / unit * unit; }
LUTRA_INLINE int32_t blocks_of(int32_t rows) { return (rows + kBlock - 1) / kBlock; }

LUTRA_INLINE uint32_t word_at(const void* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return word;
}

// How to load the values of a block's rows from any plane. Consecutive rows are a plain load.
// Others are covered by windows of 16 bytes, each beginning at a row that no window before it
// reaches. The first is read by tbl, the others by tbx, which leaves a lane alone whose index is
// too large.
struct Rows {
  bool whole;
  int32_t windows;
  int32_t offset[kBlock];
  alignas(16) uint8_t index[kBlock][kBlock];
};

struct WholeRows {
  int32_t offset;
  LUTRA_INLINE explicit WholeRows(const Rows& r) : offset(r.offset[0]) {}
  LUTRA_INLINE uint8x16_t load(const uint8_t* plane) const { return vld1q_u8(plane + offset); }
};

template <bool kTwo>
struct WindowRows {
  const Rows& rows;
  uint8x16_t first, second;
  LUTRA_INLINE explicit WindowRows(const Rows& r)
      : rows(r), first(vld1q_u8(r.index[0])), second(vld1q_u8(r.index[1])) {}
  LUTRA_INLINE uint8x16_t load(const uint8_t* plane) const {
    uint8x16_t v = vqtbl1q_u8(vld1q_u8(plane + rows.offset[0]), first);
    v = vqtbx1q_u8(v, vld1q_u8(plane + rows.offset[1]), second);
    for (int32_t i = 2; !kTwo && i < rows.windows; ++i) {
      v = vqtbx1q_u8(v, vld1q_u8(plane + rows.offset[i]), vld1q_u8(rows.index[i]));
    }
    return v;
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

// The rows `first`.. of a tile; those beyond the valid ones are anything.
[[gnu::noinline]] void find_rows(const Patch& p, int32_t first, Rows* rows) {
  const int32_t* const row = p.row + first;
  const int32_t valid = p.rows - first < kBlock ? p.rows - first : kBlock;
  rows->whole = true;
  rows->offset[0] = row[0];
  for (int32_t r = 1; !p.consecutive && r < valid; ++r) {
    if (row[r] != row[0] + r) rows->whole = false;
  }
  if (rows->whole) return;
  int32_t n = 0;
  for (int32_t r = 0; r < kBlock; ++r) {
    if (n == 0 || row[r] - rows->offset[n - 1] >= kBlock) {
      vst1q_u8(rows->index[n], vdupq_n_u8(255));
      rows->offset[n++] = row[r];
    }
    rows->index[n - 1][r] = static_cast<uint8_t>(row[r] - rows->offset[n - 1]);
  }
  if (n == 1) {
    vst1q_u8(rows->index[1], vdupq_n_u8(255));
    rows->offset[1] = row[0];
    n = 2;
  }
  rows->windows = n;
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

// Four bytes of each of 16 rows, side by side.
LUTRA_INLINE void store_quads(uint8_t* to, uint8x16_t a, uint8x16_t b, uint8x16_t c, uint8x16_t d) {
  const uint16x8_t low_ab = vreinterpretq_u16_u8(vzip1q_u8(a, b));
  const uint16x8_t high_ab = vreinterpretq_u16_u8(vzip2q_u8(a, b));
  const uint16x8_t low_cd = vreinterpretq_u16_u8(vzip1q_u8(c, d));
  const uint16x8_t high_cd = vreinterpretq_u16_u8(vzip2q_u8(c, d));
  vst1q_u8(to, vreinterpretq_u8_u16(vzip1q_u16(low_ab, low_cd)));
  vst1q_u8(to + 16, vreinterpretq_u8_u16(vzip2q_u16(low_ab, low_cd)));
  vst1q_u8(to + 32, vreinterpretq_u8_u16(vzip1q_u16(high_ab, high_cd)));
  vst1q_u8(to + 48, vreinterpretq_u8_u16(vzip2q_u16(high_ab, high_cd)));
}

// 16 words that fit a byte -> bytes.
LUTRA_INLINE uint8x16_t narrow_words(const int32x4_t* v) {
  const int16x8_t low = vmovn_high_s32(vmovn_s32(v[0]), v[1]);
  const int16x8_t high = vmovn_high_s32(vmovn_s32(v[2]), v[3]);
  return vreinterpretq_u8_s8(vmovn_high_s16(vmovn_s16(low), high));
}

// total[0..3] += 16 words of two registers of 16 bits.
LUTRA_INLINE void add_words(int16x8_t low, int16x8_t high, int32x4_t* total) {
  total[0] = vaddw_s16(total[0], vget_low_s16(low));
  total[1] = vaddw_high_s16(total[1], low);
  total[2] = vaddw_s16(total[2], vget_low_s16(high));
  total[3] = vaddw_high_s16(total[3], high);
}

// --- grids and the epilogue ----------------------------------------------------------------------

LUTRA_INLINE void store_bytes(uint8_t* to, uint8x16_t v, int32_t count) {
  if (count >= kBlock) return vst1q_u8(to, v);
  uint8_t bytes[kBlock];
  vst1q_u8(bytes, v);
  for (int32_t i = 0; i < count; ++i) to[i] = bytes[i];
}

// x / scale, of which only what is below the upper end need be exact. The clamp keeps the remainder
// of the correction from being inf - inf there; below, NaN and -inf come to the same.
LUTRA_INLINE float32x4_t quotient(float32x4_t x, const Grid& g) {
  if (g.inverse == 0.0f) return vdivq_f32(x, vdupq_n_f32(g.scale));
  const float32x4_t above = vdupq_n_f32(static_cast<float>(g.qmax - g.zero + 1));
  const float32x4_t t = vminq_f32(above, vmulq_n_f32(x, g.inverse));
  return vfmaq_n_f32(t, vfmsq_n_f32(x, t, g.scale), g.inverse);
}

// 16 quotients -> bytes of the grid. fmaxnm gives the number where the other operand is NaN.
LUTRA_INLINE uint8x16_t grid_bytes(const float32x4_t* t, const Grid& g) {
  const float32x4_t low = vdupq_n_f32(static_cast<float>(-g.zero));
  const float32x4_t high = vdupq_n_f32(static_cast<float>(g.qmax - g.zero));
  int32x4_t q[4];
  for (int32_t i = 0; i < 4; ++i) q[i] = vcvtnq_s32_f32(vminq_f32(vmaxnmq_f32(t[i], low), high));
  return vaddq_u8(narrow_words(q), vdupq_n_u8(static_cast<uint8_t>(g.zero)));
}

// The epilogue of one output, 16 rows in registers. A copy of the contract's, so that no store can
// change it.
struct Finish {
  Epilogue e;

  LUTRA_INLINE explicit Finish(const Epilogue& epilogue) : e(epilogue) {}

  LUTRA_INLINE bool folds(int32_t m) const {
    return e.fold_scale && e.fold_scale[m] == e.fold_scale[m];
  }

  // 16 rows from `row`; the sums are those given and `base`.
  LUTRA_INLINE void sums(int32_t m, int32_t row, int32_t base, const int32x4_t* s) const {
    const uint32_t sum =
        static_cast<uint32_t>(base) + static_cast<uint32_t>(e.offset ? e.offset[m] : 0);
    const int32x4_t offset = vdupq_n_s32(static_cast<int32_t>(sum));
    float32x4_t y[4];
    for (int32_t i = 0; i < 4; ++i) y[i] = vcvtq_f32_s32(vaddq_s32(s[i], offset));
    if (folds(m)) {
      const float32x4_t scale = vdupq_n_f32(e.fold_scale[m]), bias = vdupq_n_f32(e.fold_bias[m]);
      for (int32_t i = 0; i < 4; ++i) y[i] = vfmaq_f32(bias, y[i], scale);
      return quantize(0, m, row, y);
    }
    sums(m, row, y);
  }

  LUTRA_INLINE void sums(int32_t m, int32_t row, const float32x4_t* from) const {
    float32x4_t y[4] = {from[0], from[1], from[2], from[3]};
    if (e.scale) {
      for (int32_t i = 0; i < 4; ++i) y[i] = vmulq_n_f32(y[i], e.scale[m]);
    }
    const float32x4_t bias = vdupq_n_f32(e.bias[m]);
    for (int32_t i = 0; i < 4; ++i) y[i] = vaddq_f32(y[i], bias);
    if (e.residual) add_residual(e.residual + m * e.residual_stride + row, e.rows - row, y);
    if (e.clamp) {
      const float32x4_t low = vdupq_n_f32(e.low), high = vdupq_n_f32(e.high);
      for (int32_t i = 0; i < 4; ++i) {
        y[i] = vbslq_f32(vcgtq_f32(y[i], low), y[i], low);  // low for NaN and for the other zero
        y[i] = vbslq_f32(vcltq_f32(y[i], high), y[i], high);
      }
    }
    if (e.out) store_floats(e.out + m * e.out_stride + row, e.rows - row, y);
    for (int32_t n = 0; n < e.quantized; ++n) {
      float32x4_t t[4];
      for (int32_t i = 0; i < 4; ++i) t[i] = quotient(y[i], e.q[n].grid);
      quantize(n, m, row, t);
    }
  }

 private:
  LUTRA_INLINE void quantize(int32_t n, int32_t m, int32_t row, const float32x4_t* t) const {
    store_bytes(e.q[n].out + m * e.q[n].stride + row, grid_bytes(t, e.q[n].grid), e.rows - row);
  }

  LUTRA_INLINE static void add_residual(const float* from, int32_t left, float32x4_t* y) {
    float some[kBlock] = {};
    if (left < kBlock) {
      for (int32_t i = 0; i < left; ++i) some[i] = from[i];
      from = some;
    }
    for (int32_t i = 0; i < 4; ++i) y[i] = vaddq_f32(y[i], vld1q_f32(from + 4 * i));
  }

  LUTRA_INLINE static void store_floats(float* to, int32_t left, const float32x4_t* y) {
    float some[kBlock];
    float* const at = left < kBlock ? some : to;
    for (int32_t i = 0; i < 4; ++i) vst1q_f32(at + 4 * i, y[i]);
    for (int32_t i = 0; left < kBlock && i < left; ++i) to[i] = some[i];
  }
};

}  // namespace
}  // namespace lutra
