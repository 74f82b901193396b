// Piecewise-linear functions with free breakpoints. Included after functions.h by the vector
// instruction sets, in the anonymous namespace of each.
//
// The entry is found by bisection, all lanes at once: level l compares x with one of 2^l pivots,
// which a permutation reads at the l decisions made so far, and its own decision becomes bit l. So
// the low bits are always all that is known, a level needs one register of pivots (two for 32
// entries on AVX2), and the entries lie in the order of these bits.
#pragma once

#include "functions.h"

namespace lutra {
namespace {

// Where the first or the last line is level x may be any number, but not infinite.
float lowest(const Piecewise& p) { return p.slope[0] == 0.0f ? -kLargest : -__builtin_inff(); }
float highest(const Piecewise& p) {
  return p.slope[p.entries - 1] == 0.0f ? kLargest : __builtin_inff();
}

template <int kEntries>
struct Levels {
  static constexpr int32_t kCount = log2_entries(kEntries);
  static constexpr int32_t kWidth = 16;  // pivots of a level, repeated
  float pivot[kCount][kWidth];
  float slope[kEntries], intercept[kEntries];
  float low, high;  // see lowest() and highest()

  explicit Levels(const Piecewise& p) {
    for (int32_t l = 0; l < kCount; ++l) {
      for (int32_t i = 0; i < kWidth; ++i) {
        pivot[l][i] = p.breakpoint[entry(i, l) + (kEntries >> (l + 1)) - 1];
      }
    }
    for (int32_t i = 0; i < kEntries; ++i) {
      slope[i] = p.slope[entry(i, kCount)];
      intercept[i] = p.intercept[entry(i, kCount)];
    }
    low = lowest(p);
    high = highest(p);
  }

  // The first entry that the lowest `levels` bits leave.
  static int32_t entry(int32_t bits_of, int32_t levels) {
    int32_t e = 0;
    for (int32_t l = 0; l < levels; ++l) e += (bits_of >> l & 1) * (kEntries >> (l + 1));
    return e;
  }
};

template <int kEntries>
struct Pieces {
  Table<kEntries> slope, intercept;
  Table<8> second, third, fourth;
  Table<16> fifth;
  Floats first, low, high;

  explicit Pieces(const Levels<kEntries>& s)
      : slope(s.slope),
        intercept(s.intercept),
        second(s.pivot[1]),
        third(s.pivot[2]),
        fourth(s.pivot[kEntries > 8 ? 3 : 2]),
        fifth(s.pivot[kEntries > 16 ? 4 : 2]),
        first(splat(s.pivot[0][0])),
        low(splat(s.low)),
        high(splat(s.high)) {}

  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    const X inside = minimum(high, maximum(low, x));
    auto i = with_bit(splat(0), at_least(x, first), 1);
    i = with_bit(i, at_least(x, at(second, i)), 2);
    auto last = at_least(x, at(third, i));
    if constexpr (kEntries > 8) {
      i = with_bit(i, last, 4);
      last = at_least(x, at(fourth, i));
    }
    if constexpr (kEntries > 16) {
      i = with_bit(i, last, 8);
      last = at_least(x, at(fifth, i));
    }
    return fmadd(at_last(slope, i, last), inside, at_last(intercept, i, last));
  }
};

template <int kEntries>
void piecewise_by_levels(const Piecewise& p, const float* x, size_t n, float* y) {
  const Levels<kEntries> levels(p);
  each(x, n, y, Pieces<kEntries>(levels));
}

}  // namespace
}  // namespace lutra
