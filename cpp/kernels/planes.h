// Norms and softmax of rows that lie across planes: lanes are rows, so that nothing is added across
// a register. Included after functions.h by the vector instruction sets, in the anonymous namespace
// of each.
#pragma once

#include "functions.h"

namespace lutra {
namespace {

void quantize(const float* x, size_t n, const Grid& grid, uint8_t* q);

constexpr int32_t kTileVectors =
    kVectorRegisters == 32 ? 4 : 2;  // times the four sums: all registers
constexpr int32_t kTileRows = kTileVectors * kLanes;

// kVectors vectors of rows, the last of which may be cut off.
template <int kVectors, bool kWhole>
struct RowVectors {
  const int32_t rows;
  LUTRA_INLINE Floats load(const float* from, int32_t v) const {
    if constexpr (kWhole) return load_floats(from + v * kLanes);
    return load_floats(from + v * kLanes, rows - v * kLanes);
  }
  LUTRA_INLINE void store(float* to, int32_t v, Floats y) const {
    if constexpr (kWhole) return store_floats(to + v * kLanes, y);
    store_floats(to + v * kLanes, y, rows - v * kLanes);
  }
};

// f(first row, RowVectors) for tiles of all rows.
template <class F>
LUTRA_INLINE void in_tiles(size_t rows, const F& f) {
  size_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) f(r, RowVectors<kTileVectors, true>{kTileRows});
  for (; r + kLanes <= rows; r += kLanes) f(r, RowVectors<1, true>{kLanes});
  if (r < rows) f(r, RowVectors<1, false>{static_cast<int32_t>(rows - r)});
}

// Writes `count` values of a plane: y holds them, or is to hold them where floats are wanted.
struct PlaneWriter {
  const PlaneOutput& to;
  size_t row;
  int32_t count;
  float* scratch;
  LUTRA_INLINE float* place(int32_t plane) const {
    return to.out ? to.out + static_cast<size_t>(plane) * to.stride + row : scratch;
  }
  LUTRA_INLINE void done(int32_t plane, const float* y) const {
    for (int32_t i = 0; i < to.quantized; ++i) {
      quantize(y, static_cast<size_t>(count), to.q[i].grid,
               to.q[i].out + static_cast<size_t>(plane) * to.q[i].stride + row);
    }
  }
};

template <int kVectors>
struct Sums {
  Floats s[4][kVectors];
  LUTRA_INLINE Sums() {
#pragma GCC unroll 4
    for (int32_t k = 0; k < 4; ++k) {
#pragma GCC unroll 4
      for (int32_t v = 0; v < kVectors; ++v) s[k][v] = splat(0.0f);
    }
  }
  LUTRA_INLINE Floats total(int32_t v) const {
    return add(add(s[0][v], s[1][v]), add(s[2][v], s[3][v]));
  }
};

// next(k, d): entry d, for the sum k = d mod 4
template <class F>
LUTRA_INLINE void by_fours(int32_t width, const F& next) {
  int32_t d = 0;
  for (; d + 4 <= width; d += 4) {
#pragma GCC unroll 4
    for (int32_t k = 0; k < 4; ++k) next(k, d + k);
  }
  if (d < width) next(0, d);
  if (d + 1 < width) next(1, d + 1);
  if (d + 2 < width) next(2, d + 2);
}

template <int kVectors, bool kWhole>
void norm_tile(const Norm& n, const float* x, size_t stride, RowVectors<kVectors, kWhole> rows,
               const PlaneWriter& to) {
  const Floats width = splat(static_cast<float>(n.width));
  Floats mean[kVectors], factor[kVectors];
  if (n.center) {
    Sums<kVectors> sums;
    by_fours(n.width, [&](int32_t k, int32_t d) {
#pragma GCC unroll 4
      for (int32_t v = 0; v < kVectors; ++v) {
        sums.s[k][v] = add(sums.s[k][v], rows.load(x + d * stride, v));
      }
    });
#pragma GCC unroll 4
    for (int32_t v = 0; v < kVectors; ++v) mean[v] = div(sums.total(v), width);
  } else {
#pragma GCC unroll 4
    for (int32_t v = 0; v < kVectors; ++v) mean[v] = splat(0.0f);
  }
  Sums<kVectors> squares;
  by_fours(n.width, [&](int32_t k, int32_t d) {
#pragma GCC unroll 4
    for (int32_t v = 0; v < kVectors; ++v) {
      const Floats c = sub(rows.load(x + d * stride, v), mean[v]);
      squares.s[k][v] = fmadd(c, c, squares.s[k][v]);
    }
  });
  float power[kTileRows];
#pragma GCC unroll 4
  for (int32_t v = 0; v < kVectors; ++v) {
    store_floats(power + v * kLanes, add(div(squares.total(v), width), splat(n.eps)));
  }
  if (n.rsqrt.entries > 0) {
    table_rsqrt(n.rsqrt, power, kVectors * kLanes, power);
  } else {
    each(power, kVectors * kLanes, power, Rsqrt());
  }
#pragma GCC unroll 4
  for (int32_t v = 0; v < kVectors; ++v) factor[v] = load_floats(power + v * kLanes);
  for (int32_t d = 0; d < n.width; ++d) {
    const Floats weight = splat(n.weight[d]), bias = splat(n.bias ? n.bias[d] : 0.0f);
    float* const y = to.place(d);
#pragma GCC unroll 4
    for (int32_t v = 0; v < kVectors; ++v) {
      const Floats c = mul(sub(rows.load(x + d * stride, v), mean[v]), factor[v]);
      rows.store(y, v, fmadd(c, weight, bias));
    }
    to.done(d, y);
  }
}

void norm(const Norm& n, const float* x, size_t stride, size_t rows, const PlaneOutput& to) {
  float scratch[kTileRows];
  in_tiles(rows, [&](size_t r, auto vectors) {
    norm_tile(n, x + r, stride, vectors, PlaneWriter{to, r, vectors.rows, scratch});
  });
}

struct ExpOfScore {
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    return exp_of_score(x);
  }
};

#ifdef LUTRA_SMALL
[[gnu::noinline]] Floats exp_of_score(const Segments& table, Floats x) {
  if (table.entries == 0) return exp_of_score(x);
  if (table.entries == 8) return TableExp<8, true>(table)(x);
  if (table.entries == 16) return TableExp<16, true>(table)(x);
  return TableExp<32, true>(table)(x);
}
struct AnyExp {
  const Segments& table;
  Floats operator()(const Floats& x) const { return exp_of_score(table, x); }
  template <class T, int kCount>
  LUTRA_INLINE auto operator()(const Many<T, kCount>& x) const {
    return for_each_part([this](const T& one) { return exp_of_score(table, one); }, x);
  }
};
#endif

// body(f), f being the exponential of a score.
template <class Body>
LUTRA_INLINE void with_exp(const Segments& table, const Body& body) {
#ifdef LUTRA_SMALL
  body(AnyExp{table});
#else
  if (table.entries == 0) return body(ExpOfScore());
  if (table.entries == 8) return body(TableExp<8, true>(table));
  if (table.entries == 16) return body(TableExp<16, true>(table));
  body(TableExp<32, true>(table));
#endif
}

// 1 / x of `count` values in place.
void invert(const Segments& table, float* x, int32_t count) {
  if (table.entries > 0) return table_reciprocal(table, x, static_cast<size_t>(count), x);
  each(x, static_cast<size_t>(count), x, Reciprocal());
}

template <class Exp, int kVectors, bool kWhole>
void softmax_tile(const Softmax& s, const Exp& exp, const float* x, size_t stride,
                  RowVectors<kVectors, kWhole> rows, float* y) {
  Floats top[kVectors], sum[kVectors];
#pragma GCC unroll 4
  for (int32_t v = 0; v < kVectors; ++v) {
    top[v] = splat(-__builtin_inff());
    sum[v] = splat(0.0f);
  }
  for (int32_t j = 0; j < s.count; ++j) {
#pragma GCC unroll 4
    for (int32_t v = 0; v < kVectors; ++v) {
      top[v] = maximum(rows.load(x + j * stride, v), top[v]);
    }
  }
  for (int32_t j = 0; j < s.count; ++j) {
    if constexpr (kVectors == kSideBySide) {
      Many<Floats, kVectors> p;
#pragma GCC unroll 4
      for (int32_t v = 0; v < kVectors; ++v) {
        p.v[v] = sub(rows.load(x + j * stride, v), top[v]);
      }
      p = exp(p);
#pragma GCC unroll 4
      for (int32_t v = 0; v < kVectors; ++v) {
        rows.store(y + j * stride, v, p.v[v]);
        sum[v] = add(sum[v], p.v[v]);
      }
    } else {
#pragma GCC unroll 4
      for (int32_t v = 0; v < kVectors; ++v) {
        const Floats p = exp(Floats(sub(rows.load(x + j * stride, v), top[v])));
        rows.store(y + j * stride, v, p);
        sum[v] = add(sum[v], p);
      }
    }
  }
  float factor[kTileRows];
#pragma GCC unroll 4
  for (int32_t v = 0; v < kVectors; ++v) store_floats(factor + v * kLanes, sum[v]);
  invert(s.reciprocal, factor, kVectors * kLanes);
#pragma GCC unroll 4
  for (int32_t v = 0; v < kVectors; ++v) sum[v] = load_floats(factor + v * kLanes);
  for (int32_t j = 0; j < s.count; ++j) {
#pragma GCC unroll 4
    for (int32_t v = 0; v < kVectors; ++v) {
      float* const to = y + j * stride;
      rows.store(to, v, mul(rows.load(to, v), sum[v]));
    }
  }
}

void softmax(const Softmax& s, const float* x, size_t stride, size_t rows, float* y) {
  with_exp(s.exp, [&](const auto& exp) {
    in_tiles(rows,
             [&](size_t r, auto vectors) { softmax_tile(s, exp, x + r, stride, vectors, y + r); });
  });
}

}  // namespace
}  // namespace lutra
