// Centroids for a search in 16 bits. Included by avx2_encode.h and neon_nearest.h, in the anonymous
// namespace of each.
//
// Only differences between the scores of one row matter, so any vector u may be taken from all
// centroids of a codebook, and any number added to all its scores. With c' = c - u, u the middle of
// the centroids entry by entry, x . c' - floor(|c|^2 / 2) + constant usually fits 16 bits for every
// x there can be. Where it does (decided per codebook, from its centroids), the search runs in 16
// bits, modulo 2^16: intermediate sums may wrap. Elsewhere it runs in 32 bits.
#pragma once

#include "kernels.h"

namespace lutra {
namespace {

struct Centred {  // one codebook
  int8_t c[64][64];
  int32_t initial[64];
  bool fits;  // in 16 bits, with the initial scores shifted accordingly
};

// Entries beyond D count as 0 and so do their c'. Their part of |c|^2 remains.
void centre(const PqShape& s, const uint8_t* codebook, int32_t valid, Centred* to) {
  const int32_t largest = (1 << s.bits) - 1;
  for (int32_t k = 0; k < s.centroids; ++k) {
    int32_t norm = 0;
    for (int32_t v = 0; v < s.dim; ++v)
      norm += int32_t{codebook[k * s.dim + v]} * codebook[k * s.dim + v];
    to->initial[k] = -(norm >> 1);
    for (int32_t v = 0; v < 64; ++v) to->c[k][v] = 0;
  }
  for (int32_t v = 0; v < valid; ++v) {
    int32_t low = 255, high = 0;
    for (int32_t k = 0; k < s.centroids; ++k) {
      const int32_t c = codebook[k * s.dim + v];
      low = c < low ? c : low;
      high = c > high ? c : high;
    }
    const int32_t middle = (low + high + 1) / 2;
    for (int32_t k = 0; k < s.centroids; ++k) {
      to->c[k][v] = static_cast<int8_t>(codebook[k * s.dim + v] - middle);
    }
  }
  int32_t low = INT32_MAX, high = INT32_MIN;  // of the scores that any x can have
  for (int32_t k = 0; k < s.centroids; ++k) {
    int32_t least = to->initial[k], most = to->initial[k];
    for (int32_t v = 0; v < valid; ++v) (to->c[k][v] < 0 ? least : most) += to->c[k][v] * largest;
    low = least < low ? least : low;
    high = most > high ? most : high;
  }
  to->fits = high - low <= 65535;
  if (to->fits) {
    for (int32_t k = 0; k < s.centroids; ++k) to->initial[k] += -32768 - low;
  }
}

}  // namespace
}  // namespace lutra
