// Piecewise-linear functions whose breakpoints are not too close to each other: cells of equal
// width over the breakpoints, at most one of them in a cell, tell the entry with one comparison.
// Else the bisection of piecewise.h. Private to avx512.cc.
#pragma once

#include "piecewise.h"

namespace lutra {
namespace {

// cell(x) = fma(x, scale, offset), rounded and clamped, never falls when x grows. So the
// breakpoints of the cells below lie below x, and those of the cells above lie above it.
template <int kEntries>
struct Cells {
  static constexpr int32_t kCount = kEntries == 32 ? 128 : 64;
  alignas(64) uint8_t below[128];  // breakpoints in the cells below
  float pivot[kEntries];           // the breakpoints, and what no number reaches
  float scale, offset;
  bool useful;

  explicit Cells(const Piecewise& p) {
    constexpr int32_t kLast = kEntries - 1;
    const float *const b = p.breakpoint, range = b[kLast - 1] - b[0];
    scale = static_cast<float>(kCount - 2) / range;
    offset = 0.5f - b[0] * scale;
    useful = range > 0.0f && range <= kLargest && scale <= kLargest && offset <= kLargest &&
             offset >= -kLargest;
    if (!useful) return;
    for (int32_t i = 0; i < kLast; ++i) pivot[i] = b[i];
    pivot[kLast] = __builtin_nanf("");
    alignas(64) int32_t cells[32];
    for (int32_t i = 0; i < kEntries; i += kLanes) {
      const int32_t left = kEntries - i;
      _mm512_store_si512(cells + i, cell(load_floats(pivot + i, left)));
    }
    __m512i low = _mm512_setzero_si512(), high = low;
    alignas(64) uint8_t bytes[128];
    for (int32_t i = 0; i < 128; ++i) bytes[i] = static_cast<uint8_t>(i);
    const __m512i first = _mm512_load_si512(bytes), second = _mm512_load_si512(bytes + 64);
    for (int32_t i = 0; i < kLast; ++i) {
      useful = useful && (i == 0 || cells[i] > cells[i - 1]);
      const __m512i at = _mm512_set1_epi8(static_cast<char>(cells[i]));
      const __m512i one = _mm512_set1_epi8(1);
      low = _mm512_mask_add_epi8(low, _mm512_cmpgt_epu8_mask(first, at), low, one);
      high = _mm512_mask_add_epi8(high, _mm512_cmpgt_epu8_mask(second, at), high, one);
    }
    _mm512_store_si512(below, low);
    _mm512_store_si512(below + 64, high);
  }

  Ints cell(Floats x) const {  // 0 for NaN
    const Floats t = maximum(fmadd(x, splat(scale), splat(offset)), splat(0.0f));
    return _mm512_cvtps_epi32(minimum(t, splat(static_cast<float>(kCount - 1))));
  }
};

// A byte for each cell, read as a dword.
template <int kEntries>
struct Below {
  __m512i first, second;
};
template <int kEntries>
Ints at(const Below<kEntries>& b, Floats cell) {
  constexpr __mmask64 kDwords = 0x1111111111111111;  // the other bytes become 0
  const Ints i = _mm512_cvtps_epi32(cell);
  return kEntries == 32 ? _mm512_maskz_permutex2var_epi8(kDwords, b.first, i, b.second)
                        : _mm512_maskz_permutexvar_epi8(kDwords, i, b.first);
}

Ints next_where(Mask m, Ints i) { return _mm512_mask_add_epi32(i, m, i, splat(1)); }
LUTRA_MANY(next_where)

template <int kEntries>
struct PiecesOfCells {
  Table<kEntries> slope, intercept, pivot;
  Below<kEntries> below;
  Floats scale, offset, most, low, high;

  PiecesOfCells(const Piecewise& p, const Cells<kEntries>& c)
      : slope(p.slope),
        intercept(p.intercept),
        pivot(c.pivot),
        below{_mm512_load_si512(c.below), _mm512_load_si512(c.below + 64)},
        scale(splat(c.scale)),
        offset(splat(c.offset)),
        most(splat(static_cast<float>(Cells<kEntries>::kCount - 1))),
        low(splat(lowest(p))),
        high(splat(highest(p))) {}

  template <class X>
  LUTRA_INLINE X operator()(const X& x) const {
    const X cell = minimum(maximum(fmadd(x, scale, offset), splat(0.0f)), most);
    const auto i = at(below, cell);
    const auto entry = next_where(at_least(x, at(pivot, i)), i);
    return fmadd(at(slope, entry), minimum(high, maximum(low, x)), at(intercept, entry));
  }
};

template <int kEntries>
void piecewise(const Piecewise& p, const float* x, size_t n, float* y) {
  const Cells<kEntries> cells(p);
  if (!cells.useful) return piecewise_by_levels<kEntries>(p, x, n, y);
  each(x, n, y, PiecesOfCells<kEntries>(p, cells));
}
void piecewise(const Piecewise& p, const float* x, size_t n, float* y) {
  if (p.entries == 8) return piecewise<8>(p, x, n, y);
  if (p.entries == 16) return piecewise<16>(p, x, n, y);
  piecewise<32>(p, x, n, y);
}

}  // namespace
}  // namespace lutra
