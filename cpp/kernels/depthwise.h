// Quads of a depthwise layer, whose bytes one multiply-add of four bytes a lane takes: neighbouring
// taps of a row of the kernel lie in one dword. Included by avx2_depthwise.h,
// avx512_depthwise.h and neon_dot_depthwise8.h, in the anonymous namespace of each.
#pragma once

#include "kernels.h"

namespace lutra {
namespace {

// A load of bytes is a vector of dwords, each the taps of one row of the tile; the rows between
// come from loads that begin one row later. Load c of kLoads = 4 covers the rows
//   step 1: 4 i + c;   step 2: 2 lanes (c / 2) + 2 i + c % 2   for lane i
// of a vector, 4 lanes rows in all, so that every byte belongs to one tap of one row, and a byte
// mask takes out those beyond the image.
constexpr int32_t kDepthwiseLoads = 4;

struct TapQuads {
  int32_t count;    // of all quads
  int32_t in_row;   // quads of a row of taps
  int32_t in_quad;  // taps of a quad, `gap` bytes apart
};

TapQuads tap_quads(const DepthwiseShape& s) {
  const int32_t in_quad = s.gap >= 1 && s.gap <= 3 ? 3 / s.gap + 1 : 1;
  const int32_t in_row = (s.row + in_quad - 1) / in_quad;
  return {s.taps / s.row * in_row, in_row, in_quad};
}

int32_t first_tap(const DepthwiseShape& s, const TapQuads& q, int32_t quad) {
  return quad / q.in_row * s.row + quad % q.in_row * q.in_quad;
}

// f(tap, byte of the dword) for the taps of a quad.
template <class F>
void each_tap(const DepthwiseShape& s, const TapQuads& q, int32_t quad, const F& f) {
  const int32_t first = first_tap(s, q, quad), end = (quad / q.in_row + 1) * s.row;
  for (int32_t i = 0; i < q.in_quad && first + i < end; ++i) f(first + i, i * s.gap);
}

// Packed weights: [output][quad][4 bytes]
size_t depthwise8_bytes(const DepthwiseShape& s, int32_t outputs) {
  return static_cast<size_t>(outputs) * tap_quads(s).count * 4;
}

void pack_depthwise8(const DepthwiseShape& s, int32_t outputs, const int8_t* weights,
                     uint8_t* packed) {
  const TapQuads q = tap_quads(s);
  for (int32_t m = 0; m < outputs; ++m, weights += s.taps) {
    for (int32_t quad = 0; quad < q.count; ++quad, packed += 4) {
      for (int32_t i = 0; i < 4; ++i) packed[i] = 0;
      each_tap(s, q, quad, [&](int32_t tap, int32_t byte) {
        packed[byte] = static_cast<uint8_t>(weights[tap]);
      });
    }
  }
}

// Row of the tile that lane i of load c belongs to, and where the load begins.
int32_t load_row(int32_t step, int32_t lanes, int32_t c, int32_t i) {
  return step == 1 ? 4 * i + c : 2 * lanes * (c / 2) + 2 * i + c % 2;
}
template <int kStep, int kLanes>
constexpr int32_t load_offset(int32_t c) {
  return kStep == 1 ? c : 4 * kLanes * (c / 2) + 2 * (c % 2);
}

// Of each instruction set. kQuads: their number, or 0 for any; kZero: padding is 0.
template <int kStep, bool kZero, int kQuads>
void depthwise8_outputs(const DepthwiseShape& s, const uint8_t* packed,
                        const DepthwiseTile<uint8_t>& x, int32_t first, int32_t last,
                        const Epilogue& e);

template <int kStep, bool kZero>
void depthwise8_quads(const DepthwiseShape& s, const uint8_t* packed,
                      const DepthwiseTile<uint8_t>& x, int32_t first, int32_t last,
                      const Epilogue& e) {
  switch (tap_quads(s).count) {
    case 3:
      return depthwise8_outputs<kStep, kZero, 3>(s, packed, x, first, last, e);
    case 10:
      return depthwise8_outputs<kStep, kZero, 10>(s, packed, x, first, last, e);
    default:
      return depthwise8_outputs<kStep, kZero, 0>(s, packed, x, first, last, e);
  }
}

void depthwise8(const DepthwiseShape& s, const uint8_t* packed, const DepthwiseTile<uint8_t>& x,
                int32_t first, int32_t last, const Epilogue& e) {
  auto* const run = s.step == 1 ? x.zero ? depthwise8_quads<1, false> : depthwise8_quads<1, true>
                    : x.zero    ? depthwise8_quads<2, false>
                                : depthwise8_quads<2, true>;
  run(s, packed, x, first, last, e);
}

}  // namespace
}  // namespace lutra
