#include "engine/layers/lowbit_choice.h"

#include <cstring>

namespace lutra {
namespace {

// The time of the kernel of tables for a full tile of rows, divided by that of the dense kernel;
// what is not here is above 1. `python -m benchmarks.lowbit --kernels` measures it.
struct Measured {
  const char* isa;
  int32_t levels, group;  // group 0: one scale for all weights of an output
  double tables_time;
};
constexpr Measured kMeasured[] = {
    {"avx2", 2, 0, 0.40},   {"avx2", 3, 0, 0.60},   {"avx2", 4, 0, 0.78},
    {"avx2", 2, 128, 0.75}, {"avx2", 3, 128, 0.92}, {"avx512", 2, 0, 0.90},
};

}  // namespace

LowBitChoice choose_lowbit(const Kernels& kernels, const LowBitShape& shape, int64_t rows) {
  const int32_t group = shape.group == shape.depth ? 0 : shape.group;
  for (const Measured& m : kMeasured) {
    if (std::strcmp(m.isa, kernels.name) != 0 || m.levels != shape.levels || m.group != group) {
      continue;
    }
    // A tile of rows takes as long when it is not full.
    const int64_t tiles = (rows + kTableRows - 1) / kTableRows;
    const double time =
        static_cast<double>(tiles * kTableRows) * m.tables_time / static_cast<double>(rows);
    return {time < 1.0 ? LowBitKernel::kTables : LowBitKernel::kDense, time};
  }
  return {LowBitKernel::kDense, 0.0};
}

}  // namespace lutra
