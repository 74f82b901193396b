// Python bindings of matrices of low-bit weights.
#include "bindings/bindings.h"
#include "engine/layers/lowbit_choice.h"
#include "kernels/dispatch.h"

namespace lutra {

using namespace nb::literals;

namespace {

// Grown once per calling thread and kept.
uint8_t* scratch(size_t needed) {
  thread_local AlignedBytes memory;
  thread_local size_t bytes = 0;
  if (needed > bytes) {
    memory = AlignedBytes::raw(needed);
    bytes = needed;
  }
  return memory.data();
}

LowBitKernel kernel_named(const std::string& name) {
  if (name == "dense") return LowBitKernel::kDense;
  if (name == "tables") return LowBitKernel::kTables;
  if (name == "registers") return LowBitKernel::kRegisters;
  throw std::invalid_argument("low-bit weights: there is no kernel '" + name +
                              "'; choose dense, tables or registers");
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void construct(LowBitMatrix* self, const std::string& isa, const std::string& kernel,
               int32_t levels, int32_t group, const Array<uint8_t, 2>& codes,
               const Array<float, 2>& scale, const std::optional<Array<int32_t, 2>>& zero) {
  const Kernels& kernels = find_kernels(isa);
  require(codes.shape(0) <= INT32_MAX && codes.shape(1) <= INT32_MAX && codes.size() > 0,
          "low-bit weights: codes have a size that is not sound");
  const LowBitShape shape{.depth = static_cast<int32_t>(codes.shape(1)),
                          .outputs = static_cast<int32_t>(codes.shape(0)),
                          .levels = levels,
                          .group = group};
  require(group >= 1 && shape.depth % group == 0 &&
              scale.shape(0) == static_cast<size_t>(shape.depth / group) &&
              scale.shape(1) == codes.shape(0) &&
              (!zero || (zero->shape(0) == scale.shape(0) && zero->shape(1) == scale.shape(1))),
          "low-bit weights: codes, group, scale and zero do not fit each other");
  const LowBitKernel kind = kernel_named(kernel);
  nb::gil_scoped_release release;
  new (self)
      LowBitMatrix(kernels, kind, shape, codes.data(), scale.data(), zero ? zero->data() : nullptr);
}

void matmul(const LowBitMatrix& matrix, ThreadPool& pool, const Array<float, 2>& x,
            const OutArray<float, 2>& out) {
  const LowBitShape& s = matrix.shape();
  require(x.shape(1) == static_cast<size_t>(s.depth) && out.shape(0) == x.shape(0) &&
              out.shape(1) == static_cast<size_t>(s.outputs),
          "low-bit weights: x and out do not fit the matrix");
  const int64_t n = static_cast<int64_t>(x.shape(0));
  if (n == 0) return;
  nb::gil_scoped_release release;
  matrix.matmul(x.data(), n, out.data(), scratch(matrix.workspace_bytes(n, pool.threads())), pool);
}

void sums(const LowBitMatrix& matrix, ThreadPool& pool, const Array<int8_t, 2>& x,
          const OutArray<int32_t, 3>& out) {
  const LowBitShape& s = matrix.shape();
  require(x.shape(1) == static_cast<size_t>(s.depth) && out.shape(0) == x.shape(0) &&
              out.shape(1) == static_cast<size_t>(matrix.groups()) &&
              out.shape(2) == static_cast<size_t>(s.outputs),
          "low-bit weights: x and out do not fit the matrix");
  const int64_t n = static_cast<int64_t>(x.shape(0));
  if (n == 0) return;
  nb::gil_scoped_release release;
  matrix.sums(x.data(), n, out.data(), scratch(matrix.workspace_bytes(n, pool.threads())), pool);
}

// The kernel for so many rows, what lookups cost relative to products, and by which kernel; see
// LowBitChoice.
std::tuple<std::string, double, std::string> choose(const std::string& isa, int32_t outputs,
                                                    int32_t depth, int32_t levels, int32_t group,
                                                    int64_t rows) {
  const LowBitShape shape{.depth = depth, .outputs = outputs, .levels = levels, .group = group};
  check_lowbit(shape);
  require(rows >= 1, "choose_lowbit: rows must be at least 1");
  const LowBitChoice choice = choose_lowbit(find_kernels(isa), shape, rows);
  return {lowbit_kernel_name(choice.kernel), choice.lookup_time,
          lowbit_kernel_name(choice.lookups)};
}

}  // namespace

void bind_lowbit(nb::module_& m) {
  nb::class_<LowBitMatrix>(m, "LowBitMatrix")
      .def("__init__", &construct, "isa"_a, "kernel"_a, "levels"_a, "group"_a, "codes"_a, "scale"_a,
           "zero"_a.none())
      .def_prop_ro("nbytes", &LowBitMatrix::bytes)
      .def("matmul", &matmul, "pool"_a, "x"_a, "out"_a)
      .def("sums", &sums, "pool"_a, "x"_a, "out"_a);
  m.def("choose_lowbit", &choose, "isa"_a, "outputs"_a, "depth"_a, "levels"_a, "group"_a, "rows"_a);
}

}  // namespace lutra
