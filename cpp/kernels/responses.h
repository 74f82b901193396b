// How vector kernels hold the table of a lookup layer: a row of bytes for each weight, to be read
// by a shuffle at the activation indices. Private to the files of the instruction sets, in the
// anonymous namespace of each.
//
// Bytes are unsigned: each row is less its minimum, and the minima of all weights of an output are
// added to its sum in the end, as one constant.
//
// With 4 levels an index byte has room for two activations, a0 + 4 a1, a "code". A row then belongs
// to a pair of weights and holds the sums of their entries ("joint"), so that a shuffle does two
// multiplications. Where sums need more than a byte, or the pairs are too many, each code is read
// twice instead, in a row for a0 and in a row for a1.
#pragma once

#include "kernels.h"

namespace lutra {
namespace {

constexpr int32_t kJointWeights = 7;  // pairs of more than these: their rows leave the cache

bool paired(const LookupShape& s) { return s.levels == 4; }

// Slices of 16 entries of a row.
int32_t row_slices(const LookupShape& s) { return s.levels <= 16 ? 1 : s.levels / 16; }

struct Responses {
  const LookupShape& shape;
  const int8_t* table;
  int32_t low[33];  // by weight: its smallest entry
  int32_t range;    // the largest difference of two entries of a weight

  Responses(const LookupShape& s, const int8_t* entries) : shape(s), table(entries), range(0) {
    for (int32_t w = 0; w < s.weights; ++w) {
      int32_t high = low[w] = entries[w];
      for (int32_t i = 1; i < s.levels; ++i) {
        const int32_t v = entries[i * s.weights + w];
        if (v < low[w]) low[w] = v;
        if (v > high) high = v;
      }
      if (high - low[w] > range) range = high - low[w];
    }
  }

  int32_t at(int32_t i, int32_t w) const { return table[i * shape.weights + w] - low[w]; }

  // Is a code read once, in a row of sums?
  bool joint() const { return paired(shape) && shape.weights <= kJointWeights && 2 * range <= 255; }

  // Entry i of the row of one weight.
  uint8_t single(int32_t w, int32_t i) const {
    return i < shape.levels ? static_cast<uint8_t>(at(i, w)) : 0;
  }
  // Entry `code` of a row of one weight of a pair, `part` 0 or 1, and of a row of both.
  uint8_t part(int32_t w, int32_t part, int32_t code) const {
    return static_cast<uint8_t>(at(part == 0 ? code & 3 : code >> 2, w));
  }
  uint8_t both(int32_t w0, int32_t w1, int32_t code) const {
    return static_cast<uint8_t>(at(code & 3, w0) + at(code >> 2, w1));
  }

  // What is to be added to the sum of an output with these weights, of which `missing` more, all
  // of them 0, are looked up at index 0 by the way. Bits above 32 do not matter.
  int32_t constant(const uint8_t* weight, int32_t missing) const {
    uint32_t sum = 0u - static_cast<uint32_t>(missing) * static_cast<uint32_t>(at(0, 0));
    for (int32_t d = 0; d < shape.depth; ++d) sum += static_cast<uint32_t>(low[weight[d]]);
    return static_cast<int32_t>(sum);
  }
};

}  // namespace
}  // namespace lutra
