// The dense kernel of low-bit weights by the bits of a field. Included by the files of the
// instruction sets after their own parts, which have dense_widths.
#pragma once

#include "lowbit.h"

namespace lutra {
namespace {

void lowbit_dense(const LowBitShape& s, const uint8_t* packed, int32_t group, const int8_t* x,
                  int32_t width, int32_t rows, int32_t first, int32_t last, int32_t* sums,
                  size_t stride) {
  packed += static_cast<size_t>(group) * dense_group_bytes(s);
  switch (field_bits(s.levels)) {
    case 1:
      return dense_widths<1>(s, packed, x, width, rows, first, last, sums, stride);
    case 2:
      return dense_widths<2>(s, packed, x, width, rows, first, last, sums, stride);
    default:
      return dense_widths<4>(s, packed, x, width, rows, first, last, sums, stride);
  }
}

}  // namespace
}  // namespace lutra
