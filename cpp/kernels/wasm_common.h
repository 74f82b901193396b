// What the WebAssembly kernels share: tiles and their blocks, loads of a plane's values, the
// epilogue. Private to wasm_kernels.h.
#pragma once

#include <wasm_simd128.h>

#include "kernels.h"
#include "wasm_fma.h"

namespace lutra {
namespace {

constexpr int32_t kRows = 64;    // rows of a tile, in blocks of 16: a register of bytes
constexpr int32_t kBlock = 16;   // rows of a block
constexpr int32_t kOutputs = 4;  // outputs of a block of packed tables or weights

LUTRA_INLINE int32_t round_up(int32_t n, int32_t unit) { return (n + unit - 1) / unit * unit; }
LUTRA_INLINE int32_t blocks_of(int32_t rows) { return (rows + kBlock - 1) / kBlock; }

LUTRA_INLINE v128_t load(const void* p) { return wasm_v128_load(p); }
LUTRA_INLINE void store(void* p, v128_t v) { wasm_v128_store(p, v); }
LUTRA_INLINE v128_t zeros() { return wasm_i32x4_const(0, 0, 0, 0); }

// Bytes of a and b in turn, of their first and of their last 8.
LUTRA_INLINE v128_t zip_low(v128_t a, v128_t b) {
  return wasm_i8x16_shuffle(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
LUTRA_INLINE v128_t zip_high(v128_t a, v128_t b) {
  return wasm_i8x16_shuffle(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// How to load the values of a block's rows from any plane. Consecutive rows are a plain load.
// Others are covered by windows of 16 bytes, each beginning at a row that no window before it
// reaches: a swizzle puts a window's values in their places and zeros, for indices that are too
// large, elsewhere.
struct Rows {
  bool whole;
  int32_t windows;  // at least 2, unless whole
  int32_t offset[kBlock];
  alignas(16) uint8_t index[kBlock][kBlock];
};

struct WholeRows {
  int32_t offset;
  LUTRA_INLINE explicit WholeRows(const Rows& r) : offset(r.offset[0]) {}
  LUTRA_INLINE v128_t load(const uint8_t* plane) const { return wasm_v128_load(plane + offset); }
};

struct WindowRows {
  const Rows& rows;
  v128_t first, second;
  LUTRA_INLINE explicit WindowRows(const Rows& r)
      : rows(r), first(wasm_v128_load(r.index[0])), second(wasm_v128_load(r.index[1])) {}
  LUTRA_INLINE v128_t load(const uint8_t* plane) const {
    v128_t v = wasm_v128_or(window(plane, 0, first), window(plane, 1, second));
    for (int32_t i = 2; i < rows.windows; ++i) {
      v = wasm_v128_or(v, window(plane, i, wasm_v128_load(rows.index[i])));
    }
    return v;
  }

 private:
  LUTRA_INLINE v128_t window(const uint8_t* plane, int32_t i, v128_t index) const {
    return wasm_i8x16_swizzle(wasm_v128_load(plane + rows.offset[i]), index);
  }
};

template <typename Body>
LUTRA_INLINE void with_rows(const Rows& rows, const Body& body) {
  if (rows.whole) {
    body(WholeRows(rows));
  } else {
    body(WindowRows(rows));
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
      store(rows->index[n], wasm_i8x16_splat(-1));
      rows->offset[n++] = row[r];
    }
    rows->index[n - 1][r] = static_cast<uint8_t>(row[r] - rows->offset[n - 1]);
  }
  if (n == 1) {
    store(rows->index[1], wasm_i8x16_splat(-1));
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

// --- grids and the epilogue ----------------------------------------------------------------------

LUTRA_INLINE void store_bytes(uint8_t* to, v128_t v, int32_t count) {
  if (count >= kBlock) return store(to, v);
  alignas(16) uint8_t bytes[kBlock];
  store(bytes, v);
  for (int32_t i = 0; i < count; ++i) to[i] = bytes[i];
}

// pmin and pmax give their first operand where they compare false, and so for NaN.
LUTRA_INLINE v128_t at_least_low(v128_t x, v128_t low) { return wasm_f32x4_pmax(low, x); }
LUTRA_INLINE v128_t at_most_high(v128_t x, v128_t high) { return wasm_f32x4_pmin(high, x); }

// Added to a float below 2^22, it rounds that to an integer, which is then in the low bits.
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23
constexpr int32_t kRounderBits = 0x4b400000;

// What a grid does to quotients.
struct GridVectors {
  v128_t low, high, base;
  LUTRA_INLINE explicit GridVectors(const Grid& g)
      : low(wasm_f32x4_splat(static_cast<float>(-g.zero))),
        high(wasm_f32x4_splat(static_cast<float>(g.qmax - g.zero))),
        base(wasm_i32x4_splat(kRounderBits - g.zero)) {}
  LUTRA_INLINE v128_t inside(v128_t t) const { return at_most_high(at_least_low(t, low), high); }
};
LUTRA_INLINE v128_t bytes_of(const v128_t* q) {  // of words that fit
  return wasm_u8x16_narrow_i16x8(wasm_i16x8_narrow_i32x4(q[0], q[1]),
                                 wasm_i16x8_narrow_i32x4(q[2], q[3]));
}

// 16 quotients -> bytes of the grid.
LUTRA_INLINE v128_t grid_bytes(const v128_t* t, const Grid& grid) {
  const GridVectors g(grid);
  v128_t q[4];
#pragma GCC unroll 4
  for (int32_t i = 0; i < 4; ++i) {
    q[i] = wasm_i32x4_sub(wasm_f32x4_add(g.inside(t[i]), wasm_f32x4_splat(kRounder)), g.base);
  }
  return bytes_of(q);
}

// fma(y, scale, bias) of 16 values -> bytes of the grid, where |bias| <= kFoldBias.
//
// A multiply and an add in float32 are two roundings. Of a value that is no more than 128 the
// product is below 1152, so that they differ from the multiply-add by less than 2^-13: enough to
// find the integer, unless the value is as near to the middle between two. There it is computed
// exactly.
constexpr float kFoldBias = 1024.0f;

LUTRA_INLINE v128_t fold_bytes(const v128_t* y, float scale, float bias, const Grid& grid) {
  const GridVectors g(grid);
  const v128_t a = wasm_f32x4_splat(scale), b = wasm_f32x4_splat(bias);
  const v128_t rounder = wasm_f32x4_splat(kRounder), sure = wasm_f32x4_splat(0.5f - 0x1p-12f);
  v128_t q[4], doubt = zeros();
#pragma GCC unroll 4
  for (int32_t i = 0; i < 4; ++i) {
    const v128_t t = g.inside(wasm_f32x4_add(wasm_f32x4_mul(y[i], a), b));
    const v128_t rounded = wasm_f32x4_add(t, rounder);
    const v128_t rest = wasm_f32x4_abs(wasm_f32x4_sub(t, wasm_f32x4_sub(rounded, rounder)));
    doubt = wasm_v128_or(doubt, wasm_f32x4_gt(rest, sure));
    q[i] = wasm_i32x4_sub(rounded, g.base);
  }
  if (!wasm_v128_any_true(doubt)) return bytes_of(q);
  v128_t t[4];
  for (int32_t i = 0; i < 4; ++i) t[i] = fused_slowly(y[i], a, b);
  return grid_bytes(t, grid);
}

// The epilogue of one output, 16 rows in registers. A copy of the contract's, so that no store can
// change it. Quotients are divisions: the multiply-adds that may replace them are no faster here.
struct Finish {
  Epilogue e;

  LUTRA_INLINE explicit Finish(const Epilogue& epilogue) : e(epilogue) {
    // A clamp that a grid does anyway.
    if (!e.clamp || e.out || e.low != 0.0f || e.high != __builtin_inff()) return;
    bool implied = true;
    for (int32_t i = 0; i < e.quantized; ++i) implied = implied && e.q[i].grid.zero == 0;
    if (implied) e.clamp = false;
  }

  LUTRA_INLINE bool folds(int32_t m) const {
    return e.fold_scale && e.fold_scale[m] == e.fold_scale[m];
  }

  // 16 rows from `row`; the sums are those given and `base`.
  [[gnu::noinline]] void sums(int32_t m, int32_t row, int32_t base, v128_t s0, v128_t s1, v128_t s2,
                              v128_t s3) const {
    const uint32_t sum =
        static_cast<uint32_t>(base) + static_cast<uint32_t>(e.offset ? e.offset[m] : 0);
    const v128_t offset = wasm_i32x4_splat(static_cast<int32_t>(sum));
    const v128_t s[4] = {s0, s1, s2, s3};
    v128_t y[4];
#pragma GCC unroll 4
    for (int32_t i = 0; i < 4; ++i) {
      y[i] = wasm_f32x4_convert_i32x4(wasm_i32x4_add(s[i], offset));
    }
    if (folds(m)) {
      const float scale = e.fold_scale[m], bias = e.fold_bias[m];
      if (bias >= -kFoldBias && bias <= kFoldBias) {
        return put(0, m, row, fold_bytes(y, scale, bias, e.q[0].grid));
      }
      v128_t t[4];
      for (int32_t i = 0; i < 4; ++i) {
        t[i] = fused_slowly(y[i], wasm_f32x4_splat(scale), wasm_f32x4_splat(bias));
      }
      return put(0, m, row, grid_bytes(t, e.q[0].grid));
    }
    finish(m, row, y);
  }
  LUTRA_INLINE void sums(int32_t m, int32_t row, int32_t base, const v128_t* s) const {
    sums(m, row, base, s[0], s[1], s[2], s[3]);
  }

  LUTRA_INLINE void float_sums(int32_t m, int32_t row, const v128_t* from) const {
    v128_t y[4] = {from[0], from[1], from[2], from[3]};
    finish(m, row, y);
  }

 private:
  LUTRA_INLINE void finish(int32_t m, int32_t row, v128_t* y) const {
    if (e.scale) {
      const v128_t scale = wasm_f32x4_splat(e.scale[m]);
#pragma GCC unroll 4
      for (int32_t i = 0; i < 4; ++i) y[i] = wasm_f32x4_mul(y[i], scale);
    }
    const v128_t bias = wasm_f32x4_splat(e.bias[m]);
#pragma GCC unroll 4
    for (int32_t i = 0; i < 4; ++i) y[i] = wasm_f32x4_add(y[i], bias);
    if (e.residual) add_residual(e.residual + m * e.residual_stride + row, e.rows - row, y);
    if (e.clamp) {
      const v128_t low = wasm_f32x4_splat(e.low), high = wasm_f32x4_splat(e.high);
#pragma GCC unroll 4
      for (int32_t i = 0; i < 4; ++i) y[i] = at_most_high(at_least_low(y[i], low), high);
    }
    if (e.out) store_floats(e.out + m * e.out_stride + row, e.rows - row, y);
    for (int32_t n = 0; n < e.quantized; ++n) {
      const v128_t scale = wasm_f32x4_splat(e.q[n].grid.scale);
      v128_t t[4];
#pragma GCC unroll 4
      for (int32_t i = 0; i < 4; ++i) t[i] = wasm_f32x4_div(y[i], scale);
      put(n, m, row, grid_bytes(t, e.q[n].grid));
    }
  }

  LUTRA_INLINE void put(int32_t n, int32_t m, int32_t row, v128_t bytes) const {
    store_bytes(e.q[n].out + m * e.q[n].stride + row, bytes, e.rows - row);
  }

  LUTRA_INLINE static void add_residual(const float* from, int32_t left, v128_t* y) {
    float some[kBlock] = {};
    if (left < kBlock) {
      for (int32_t i = 0; i < left; ++i) some[i] = from[i];
      from = some;
    }
#pragma GCC unroll 4
    for (int32_t i = 0; i < 4; ++i) y[i] = wasm_f32x4_add(y[i], load(from + 4 * i));
  }

  LUTRA_INLINE static void store_floats(float* to, int32_t left, const v128_t* y) {
    float some[kBlock];
    float* const at = left < kBlock ? some : to;
#pragma GCC unroll 4
    for (int32_t i = 0; i < 4; ++i) store(at + 4 * i, y[i]);
    for (int32_t i = 0; left < kBlock && i < left; ++i) to[i] = some[i];
  }
};

}  // namespace
}  // namespace lutra
