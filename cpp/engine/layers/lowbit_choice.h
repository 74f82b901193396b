// Which kernel multiplies a matrix of low-bit weights fastest.
#pragma once

#include "engine/layers/lowbit.h"

namespace lutra {

struct LowBitChoice {
  LowBitKernel kernel;
  // The time of lookups for these rows, divided by that of the dense kernel; 0 where lookups were
  // measured to be slower.
  double lookup_time;
  LowBitKernel lookups;  // which these are
};

// For a product of `rows` rows with weights of this shape.
LowBitChoice choose_lowbit(const Kernels& kernels, const LowBitShape& shape, int64_t rows);

}  // namespace lutra
