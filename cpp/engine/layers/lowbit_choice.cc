#include "engine/layers/lowbit_choice.h"

#include <cstring>

#include "kernels/dispatch.h"

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
  bool zen4 = false;                // of this core only, in place of the others
  double building = 0.0;            // of tables in registers: what it adds, times the outputs
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
    {"avx512", 3, 0, 0.0, {0.84}, true, 165.0},
    {"avx512", 3, 128, 0.0, {0.80}, true, 300.0},
    {"avx512", 8, 0, 0.0, {}, true},
    {"avx2", 8, 0, 0.0, {}, true},
};

// What was measured, or null. Of a core of its own first.
const Measured* measured(const char* isa, int32_t levels, int32_t group) {
  static const bool is_zen4 = cpu_is_zen4();
  const Measured* found = nullptr;
  for (const Measured& m : kMeasured) {
    const bool is_it = std::strcmp(m.isa, isa) == 0 && m.levels == levels && m.group == group;
    if (is_it && (!m.zen4 || is_zen4) && (!found || m.zen4)) found = &m;
  }
  return found;
}

}  // namespace

LowBitChoice choose_lowbit(const Kernels& kernels, const LowBitShape& shape, int64_t rows) {
  const int32_t group = shape.group == shape.depth ? 0 : shape.group;
  LowBitChoice best{LowBitKernel::kDense, 0.0, LowBitKernel::kDense};
  const Measured* const m = measured(kernels.name, shape.levels, group);
  if (!m) return best;
  const auto consider = [&best](LowBitKernel kernel, double time) {
    if (time > 0.0 && (best.lookup_time == 0.0 || time < best.lookup_time)) {
      best = {time < 1.0 ? kernel : LowBitKernel::kDense, time, kernel};
    }
  };
  // A tile of tables takes as long when it is not full.
  const int64_t tiles = (rows + kTableRows - 1) / kTableRows;
  consider(LowBitKernel::kTables,
           static_cast<double>(tiles * kTableRows) * m->tables / static_cast<double>(rows));
  if (rows <= kRegisterRows && m->registers[rows - 1] > 0.0) {
    consider(LowBitKernel::kRegisters, m->registers[rows - 1] + m->building / shape.outputs);
  }
  return best;
}

}  // namespace lutra
