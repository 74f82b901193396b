#include "engine/layers/lowbit_choice.h"

#include <cstring>

namespace lutra {
namespace {

// Times of lookups, divided by those of the dense kernel for as many rows; what is not here is
// above 1. `python -m benchmarks.lowbit --kernels` measures them; that of neon is the least gain
// among the models of cores that llvm-mca has (docs/kernels.md).
struct Measured {
  const char* isa;
  int32_t levels, group;            // group 0: one scale for all weights of an output
  double tables;                    // of a full tile of rows; 0: not faster
  double registers[kRegisterRows];  // of 1, 2, ... rows; 0: not faster
};
constexpr Measured kMeasured[] = {
    {"avx2", 2, 0, 0.40, {0.68, 0.83, 0.83}},
    {"avx2", 2, 128, 0.75, {0.75}},
    {"avx2", 2, 32, 0.0, {0.90}},
    {"avx2", 3, 0, 0.60, {}},
    {"avx2", 3, 128, 0.92, {}},
    {"avx2", 4, 0, 0.78, {}},
    {"avx2", 8, 0, 0.0, {0.88}},
    {"avx512", 2, 0, 0.90, {0.65, 0.82, 0.83, 0.94}},
    {"avx512", 2, 128, 0.0, {0.77}},
    {"avx512", 2, 32, 0.0, {0.89}},
    {"avx512", 8, 0, 0.0, {0.72}},
    {"neon", 2, 0, 0.0, {0.94}},
};

}  // namespace

LowBitChoice choose_lowbit(const Kernels& kernels, const LowBitShape& shape, int64_t rows) {
  const int32_t group = shape.group == shape.depth ? 0 : shape.group;
  LowBitChoice best{LowBitKernel::kDense, 0.0};
  for (const Measured& m : kMeasured) {
    if (std::strcmp(m.isa, kernels.name) != 0 || m.levels != shape.levels || m.group != group) {
      continue;
    }
    const auto consider = [&best](LowBitKernel kernel, double time) {
      if (time > 0.0 && (best.lookup_time == 0.0 || time < best.lookup_time)) {
        best = {time < 1.0 ? kernel : LowBitKernel::kDense, time};
      }
    };
    // A tile of tables takes as long when it is not full.
    const int64_t tiles = (rows + kTableRows - 1) / kTableRows;
    consider(LowBitKernel::kTables,
             static_cast<double>(tiles * kTableRows) * m.tables / static_cast<double>(rows));
    if (rows <= kRegisterRows) consider(LowBitKernel::kRegisters, m.registers[rows - 1]);
  }
  return best;
}

}  // namespace lutra
