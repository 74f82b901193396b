// Functions of one variable, and tables of them, on the lanes of an instruction set. Included by
// the files of the instruction sets after their ..._lanes.h, in the anonymous namespace of each:
// what the operations do is said in scalar_lanes.h, and here they are put together only once.
//
// The polynomials are least maximum fits (relative error, unless said otherwise) in float64,
// rounded to float32. NaN gives NaN, because minimum() and maximum() return their second operand.
#pragma once

#include "kernels.h"

#ifndef LUTRA_INLINE
#define LUTRA_INLINE [[gnu::always_inline]] inline
#endif

#include "many.h"

namespace lutra {
namespace {

// LUTRA_SMALL makes one copy of a loop and not one for each case: where the size of code counts.

// Registers that each() and other loops do side by side.
constexpr int kSideBySide = kVectorRegisters == 32 ? 4 : 2;

// Added to a float below 2^22, it rounds that to an integer.
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;  // 16 bits, and the rest
constexpr float kLargest = 3.40282347e38f;

// e^x = (1 + p r) 2^n for |x| < 2^20, with |r| <= log(2) / 2. Gives p.
template <class X>
LUTRA_INLINE X powers_of_e(const X& x, X& n, X& r) {
  n = sub(fmadd(x, splat(kLog2E), splat(kMagic)), splat(kMagic));
  r = fnmadd(n, splat(kLn2Low), fnmadd(n, splat(kLn2High), x));
  X p = fmadd(splat(0.00138145395f), r, splat(0.00836874545f));
  p = fmadd(p, r, splat(0.0416683890f));
  p = fmadd(p, r, splat(0.166665211f));
  p = fmadd(p, r, splat(0.499999940f));
  return fmadd(p, r, splat(1.0f));
}

// e^x = y 2^n for |x| < 2^20; 1 ulp. Gives y.
template <class X>
LUTRA_INLINE X power_of_e(const X& x, X& n) {
  X r;
  const X p = powers_of_e(x, n, r);
  return fmadd(p, r, splat(1.0f));
}

template <class X>
LUTRA_INLINE X exp_of(const X& x) {
  const X inside = minimum(splat(89.0f), maximum(splat(-104.0f), x));
  X n;
  const X y = power_of_e(inside, n);
  return scale_gradual(y, n);
}

// e^x of a score less the largest: x <= 0; below -87 it is 0.
template <class X>
LUTRA_INLINE X exp_of_score(const X& x) {
  X n;
  const X y = power_of_e(X(maximum(splat(-87.0f), x)), n);
  return zero_where(less(x, splat(-87.0f)), scale(y, n));
}

// Phi(-a), the normal distribution's tail, for 0 <= a <= 10: 2 to the power of a polynomial, whose
// error may grow as Phi falls: that of a Phi(-a) is below 6e-8.
template <class X>
LUTRA_INLINE X tail_of(const X& a) {
  X p = fmadd(splat(9.38277793e-8f), a, splat(-2.65379617e-6f));
  p = fmadd(p, a, splat(2.81953762e-5f));
  p = fmadd(p, a, splat(-1.16214440e-4f));
  p = fmadd(p, a, splat(-3.30698240e-4f));
  p = fmadd(p, a, splat(7.33975926e-3f));
  p = fmadd(p, a, splat(-5.26995808e-2f));
  p = fmadd(p, a, splat(-4.59137797e-1f));
  p = fmadd(p, a, splat(-1.15111411f));
  p = fmadd(p, a, splat(-0.999999821f));
  const X n = sub(add(p, splat(kMagic)), splat(kMagic)), r = sub(p, n);
  X y = fmadd(splat(1.53533620e-4f), r, splat(0.00133988739f));
  y = fmadd(y, r, splat(0.00961843692f));
  y = fmadd(y, r, splat(0.0555033237f));
  y = fmadd(y, r, splat(0.240226477f));
  y = fmadd(y, r, splat(0.693147182f));
  return scale(fmadd(y, r, splat(1.0f)), n);
}

template <class X>
LUTRA_INLINE X magnitude(const X& x) {
  return floats(both(bits(x), splat(0x7fffffff)));
}
template <class X>
LUTRA_INLINE X with_sign(const X& positive, const X& x) {
  return floats(either(bits(positive), both(bits(x), splat(INT32_MIN))));
}

struct Gelu {  // x Phi(x) = max(x, 0) - |x| Phi(-|x|)
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    const X a = minimum(splat(10.0f), magnitude(x));
    return fnmadd(a, tail_of(a), maximum(splat(0.0f), x));
  }
};

// x / (1 + e^-t). The clamp keeps -inf from being divided by infinity.
template <class N, class X>
LUTRA_INLINE X gated(const N& x, const X& t) {
  const X e = exp_of(sub(splat(0.0f), t));
  return div(maximum(splat(-kLargest), x), add(e, splat(1.0f)));
}

struct GeluTanh {  // 0.5 x (1 + tanh u) = x / (1 + e^-2u)
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    const X inside = maximum(splat(-kLargest), x);
    const X cubic = fmadd(mul(inside, inside), splat(0.0713548163f), splat(1.59576912f));
    return gated(inside, mul(inside, cubic));
  }
};

struct Silu {
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    return gated(x, x);
  }
};

struct Sigmoid {
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    return gated(splat(1.0f), x);
  }
};

struct Tanh {  // a quotient of polynomials up to 9, where it has become 1
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    const X a = minimum(splat(9.0f), magnitude(x)), u = mul(a, a);
    X p = fmadd(splat(1.82089222e-11f), u, splat(-1.27622168e-8f));
    p = fmadd(p, u, splat(9.26128996e-6f));
    p = fmadd(p, u, splat(2.92008836e-3f));
    p = fmadd(p, u, splat(1.29186019e-1f));
    p = fmadd(p, u, splat(0.99999994f));
    X q = fmadd(splat(2.28007193e-4f), u, splat(2.37604100e-2f));
    q = fmadd(q, u, splat(4.62518841e-1f));
    q = fmadd(q, u, splat(1.0f));
    return with_sign(minimum(splat(1.0f), div(mul(a, p), q)), x);
  }
};

struct Exp {
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    return exp_of(x);
  }
};

struct Erf {  // 1 - 2 Phi(-a sqrt 2), and a polynomial where that would lose bits
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    const X a = minimum(splat(7.0f), magnitude(x)), u = mul(a, a);
    X p = fmadd(splat(7.85388256e-5f), u, splat(-8.01020069e-4f));
    p = fmadd(p, u, splat(5.18832868e-3f));
    p = fmadd(p, u, splat(-2.68538129e-2f));
    p = fmadd(p, u, splat(1.12835854e-1f));
    p = fmadd(p, u, splat(-3.76126260e-1f));
    p = mul(a, fmadd(p, u, splat(1.12837923f)));
    const X far = fnmadd(splat(2.0f), tail_of(mul(a, splat(1.41421356f))), splat(1.0f));
    return with_sign(choose(at_least(a, splat(0.9f)), far, p), x);
  }
};

struct Sqrt {
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    return root(x);
  }
};

struct Rsqrt {
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    return div(splat(1.0f), root(x));
  }
};

struct Reciprocal {
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    return div(splat(1.0f), x);
  }
};

// log(x) = n log(2) + log(1 + t) with 1 + t in [sqrt(1/2), sqrt(2)), for numbers from 2^-126 on.
template <class X>
LUTRA_INLINE X log_of_positive(const X& x) {
  // With the bits of sqrt(1/2) where those of 1 were, the exponent is n + 127.
  const auto moved = add(bits(x), splat(0x3f800000 - 0x3f3504f3));
  const auto n = either(shift_right<23>(moved), splat(0x4b000000));  // as a float, 2^23 + n + 127
  const auto e = sub(floats(n), splat(8388735.0f));
  const X t = sub(floats(add(both(moved, splat(0x007fffff)), splat(0x3f3504f3))), splat(1.0f));
  const X u = mul(t, t);
  X p = fmadd(splat(7.0376836292e-2f), t, splat(-1.1514610310e-1f));
  p = fmadd(p, t, splat(1.1676998740e-1f));
  p = fmadd(p, t, splat(-1.2420140846e-1f));
  p = fmadd(p, t, splat(1.4249322787e-1f));
  p = fmadd(p, t, splat(-1.6668057665e-1f));
  p = fmadd(p, t, splat(2.0000714765e-1f));
  p = fmadd(p, t, splat(-2.4999993993e-1f));
  p = fmadd(p, t, splat(3.3333331174e-1f));
  X y = mul(mul(p, t), u);
  y = fmadd(e, splat(kLn2Low), y);
  y = fnmadd(splat(0.5f), u, y);
  return fmadd(e, splat(kLn2High), add(t, y));
}

constexpr float kSmallest = 1.17549435e-38f;  // of the floats with 24 bits

struct Log {
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    const X y = log_of_positive(X(minimum(splat(kLargest), maximum(splat(kSmallest), x))));
    const auto infinity = splat(__builtin_inff()), nan = splat(__builtin_nanf(""));
    const X high = choose(at_least(x, infinity), infinity, y);
    const X low = choose(at_least(splat(0.0f), x), sub(splat(0.0f), infinity), high);
    const X below = choose(less(x, splat(0.0f)), nan, low);
    return choose(unordered(x), x, below);
  }
};

struct Elu {
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    const X inside = maximum(splat(-87.0f), minimum(splat(0.0f), x));
    X n, r;
    const X p = powers_of_e(inside, n, r);
    const X far = sub(scale(fmadd(p, r, splat(1.0f)), n), splat(1.0f));
    const X y = choose(at_least(inside, splat(-0.34f)), mul(p, inside), far);
    return choose(less(x, splat(0.0f)), y, x);
  }
};

struct Softplus {  // max(x, 0) + log(1 + e^-|x|)
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    const X e = exp_of(X(sub(splat(0.0f), magnitude(x)))), u = add(e, splat(1.0f));
    // What rounding took from e on the way to u is made up for by the quotient.
    const X kept = sub(u, splat(1.0f));
    const X y = div(mul(log_of_positive(u), e), maximum(splat(kSmallest), kept));
    const X small = choose(at_least(splat(0.0f), kept), e, y);
    return choose(unordered(x), x, X(add(maximum(splat(0.0f), x), small)));
  }
};

struct Mish {  // with n = e^x (e^x + 2): x n / (n + 2)
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    const X inside = maximum(splat(-kLargest), x);
    const X e = exp_of(X(minimum(splat(20.0f), x))), n = mul(e, add(e, splat(2.0f)));
    return mul(inside, div(n, add(n, splat(2.0f))));
  }
};

// y[i] = f(x[i])
template <class F>
void each(const float* x, size_t n, float* y, const F& f) {
  size_t i = 0;
#ifdef LUTRA_SMALL
  for (; i < n; i += kLanes) {
    const int32_t left = n - i < kLanes ? static_cast<int32_t>(n - i) : kLanes;
    store_floats(y + i, f(load_floats(x + i, left)), left);
  }
#else
  if constexpr (kLanes > 1) {
    for (; i + kSideBySide * kLanes <= n; i += kSideBySide * kLanes) {
      Many<Floats, kSideBySide> v;
#pragma GCC unroll 4
      for (int k = 0; k < kSideBySide; ++k) v.v[k] = load_floats(x + i + k * kLanes);
      v = f(v);
#pragma GCC unroll 4
      for (int k = 0; k < kSideBySide; ++k) store_floats(y + i + k * kLanes, v.v[k]);
    }
  }
  for (; i + kLanes <= n; i += kLanes) store_floats(y + i, f(load_floats(x + i)));
  const int32_t left = static_cast<int32_t>(n - i);
  if (left > 0) store_floats(y + i, f(load_floats(x + i, left)), left);
#endif
}

void function(Function f, const float* x, size_t n, float* y) {
  switch (f) {
    case Function::kGelu:
      return each(x, n, y, Gelu());
    case Function::kGeluTanh:
      return each(x, n, y, GeluTanh());
    case Function::kSilu:
      return each(x, n, y, Silu());
    case Function::kTanh:
      return each(x, n, y, Tanh());
    case Function::kSigmoid:
      return each(x, n, y, Sigmoid());
    case Function::kExp:
      return each(x, n, y, Exp());
    case Function::kErf:
      return each(x, n, y, Erf());
    case Function::kSqrt:
      return each(x, n, y, Sqrt());
    case Function::kRsqrt:
      return each(x, n, y, Rsqrt());
    case Function::kReciprocal:
      return each(x, n, y, Reciprocal());
    case Function::kLog:
      return each(x, n, y, Log());
    case Function::kElu:
      return each(x, n, y, Elu());
    case Function::kSoftplus:
      return each(x, n, y, Softplus());
    case Function::kMish:
      return each(x, n, y, Mish());
  }
}

struct Bends {
  const Bend* bends;
  int32_t count;
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    X y = x;
    for (int32_t i = 0; i < count; ++i) {
      const Floats a = splat(bends[i].a), b = splat(bends[i].b);
      switch (bends[i].kind) {
        case BendKind::kLine:
          y = add(mul(y, a), b);
          break;
        case BendKind::kLimits:
          y = minimum(maximum(y, a), b);
          break;
        case BendKind::kHardswish:
          y = div(mul(y, minimum(maximum(add(y, splat(3.0f)), splat(0.0f)), splat(6.0f))),
                  splat(6.0f));
          break;
        case BendKind::kLeaky:
          y = choose(less(splat(0.0f), y), y, mul(y, a));
          break;
      }
    }
    return y;
  }
};

void bend(const Bend* bends, int32_t count, const float* x, size_t n, float* y) {
  each(x, n, y, Bends{bends, count});
}

// --- tables indexed by the bits of a float ------------------------------------------------------

constexpr int32_t log2_entries(int32_t entries) { return entries == 8 ? 3 : entries == 16 ? 4 : 5; }

template <int kEntries, bool kScore = false>  // kScore: x <= 0
struct TableExp {
  Table<kEntries> slope, intercept;
  explicit TableExp(const Segments& s) : slope(s.slope), intercept(s.intercept) {}
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    const X above = maximum(splat(-87.0f), x);
    X inside = above;
    if constexpr (!kScore) inside = minimum(splat(88.0f), above);
    const X t = mul(inside, splat(kLog2E)), whole = floor_of(t);
    const auto i = floor_ints(mul(inside, splat(kLog2E * kEntries)));
    const X y = fmadd(at(slope, i), sub(t, whole), at(intercept, i));
    return zero_where(less(x, splat(-87.0f)), scale(y, whole));
  }
};

template <int kEntries>
struct TableReciprocal {
  Table<kEntries> slope, intercept;
  explicit TableReciprocal(const Segments& s) : slope(s.slope), intercept(s.intercept) {}
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    const auto b = bits(x);
    const auto i = shift_right<23 - log2_entries(kEntries)>(b);
    const auto m = either(both(b, splat(0x007fffff)), splat(0x3f800000));
    const auto exponent = lesser(both(b, splat(0x7f800000)), splat(0x7f000000));
    const auto factor = either(sub(splat(0x7f000000), exponent), both(b, splat(INT32_MIN)));
    const X y = fmadd(at(slope, i), floats(m), at(intercept, i));
    return choose(unordered(x), x, mul(y, floats(factor)));
  }
};

// The exponent's last bit and the mantissa's first are the index as they stand; for that the halves
// of the table change places, and where that bit is 1 the mantissa is 4 times too large.
template <int kEntries>
struct SwappedHalves {
  float slope[kEntries], intercept[kEntries];
  explicit SwappedHalves(const Segments& s) {
    constexpr int32_t kHalf = kEntries / 2;
    for (int32_t i = 0; i < kHalf; ++i) {
      slope[i] = s.slope[i + kHalf];
      slope[i + kHalf] = s.slope[i] * 0.25f;
      intercept[i] = s.intercept[i + kHalf];
      intercept[i + kHalf] = s.intercept[i];
    }
  }
};

template <int kEntries>
struct TableRsqrt {
  Table<kEntries> slope, intercept;
  explicit TableRsqrt(const SwappedHalves<kEntries>& s) : slope(s.slope), intercept(s.intercept) {}
  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    const auto b = lesser(bits(x), splat(0x7f7fffff));
    const auto i = shift_right<24 - log2_entries(kEntries)>(b);
    const auto m = either(both(b, splat(0x00ffffff)), splat(0x40000000));
    const auto half = both(shift_right<1>(add(b, splat(0x00800000))), splat(0x3f800000));
    const X y = fmadd(at(slope, i), floats(m), at(intercept, i));
    const X all = mul(y, floats(sub(splat(0x5f800000), half)));
    return choose(at_least(x, splat(0.0f)), all, splat(__builtin_nanf("")));
  }
};

template <int kEntries>
void table_exp(const Segments& s, const float* x, size_t n, float* y) {
  each(x, n, y, TableExp<kEntries>(s));
}
void table_exp(const Segments& s, const float* x, size_t n, float* y) {
  if (s.entries == 8) return table_exp<8>(s, x, n, y);
  if (s.entries == 16) return table_exp<16>(s, x, n, y);
  table_exp<32>(s, x, n, y);
}

template <int kEntries>
void table_reciprocal(const Segments& s, const float* x, size_t n, float* y) {
  each(x, n, y, TableReciprocal<kEntries>(s));
}
void table_reciprocal(const Segments& s, const float* x, size_t n, float* y) {
  if (s.entries == 8) return table_reciprocal<8>(s, x, n, y);
  if (s.entries == 16) return table_reciprocal<16>(s, x, n, y);
  table_reciprocal<32>(s, x, n, y);
}

template <int kEntries>
void table_rsqrt(const Segments& s, const float* x, size_t n, float* y) {
  const SwappedHalves<kEntries> swapped(s);
  each(x, n, y, TableRsqrt<kEntries>(swapped));
}
void table_rsqrt(const Segments& s, const float* x, size_t n, float* y) {
  if (s.entries == 8) return table_rsqrt<8>(s, x, n, y);
  if (s.entries == 16) return table_rsqrt<16>(s, x, n, y);
  table_rsqrt<32>(s, x, n, y);
}

}  // namespace
}  // namespace lutra
