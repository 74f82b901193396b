// Ranges of the entries of tables, which decide what can be added in bytes. Included by
// avx2_tables.h and avx512_tables.h, in the anonymous namespace of each.
#pragma once

#include "kernels.h"

namespace lutra {
namespace {

// The least value and the range of a codebook and an output; both 0 for those that do not exist.
void find_range(const PqShape& s, const int8_t* tables, int32_t b, int32_t m, int32_t* least,
                int32_t* range) {
  *least = *range = 0;
  if (b >= s.codebooks || m >= s.outputs) return;
  int32_t low = 127, high = -128;
  for (int32_t k = 0; k < s.centroids; ++k) {
    const int32_t v = tables[(static_cast<size_t>(b) * s.centroids + k) * s.outputs + m];
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  *least = low;
  *range = high - low;
}

}  // namespace
}  // namespace lutra
