// Python bindings of the kernels of functions, on arrays.
#include <algorithm>

#include "bindings/bindings.h"
#include "engine/steps/function_tables.h"
#include "kernels/dispatch.h"

namespace lutra {

using namespace nb::literals;

namespace {

using AnyFloats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using NewFloats = nb::ndarray<nb::numpy, float>;

Tensor<float> tensor(const Array<float, 1>& a) {
  return {a.data(), {static_cast<int64_t>(a.shape(0))}};
}

// A new array of the shape of x, filled by f(from, size, to).
template <class F>
NewFloats like(const AnyFloats& x, const F& f) {
  std::vector<size_t> dims;
  for (size_t i = 0; i < x.ndim(); ++i) dims.push_back(x.shape(i));
  float* const data = new float[std::max<size_t>(x.size(), 1)];
  const nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  {
    nb::gil_scoped_release release;
    f(x.data(), x.size(), data);
  }
  return NewFloats(data, dims.size(), dims.data(), owner);
}

using SegmentKernel = void (*Kernels::*)(const Segments&, const float*, size_t, float*);

template <SegmentKernel kKernel>
NewFloats by_segments(const std::string& isa, const AnyFloats& x, const Array<float, 1>& slope,
                      const Array<float, 1>& intercept) {
  const Kernels& kernels = find_kernels(isa);
  const Segments table = checked_segments("table", tensor(slope), tensor(intercept));
  return like(
      x, [&](const float* from, size_t n, float* to) { (kernels.*kKernel)(table, from, n, to); });
}

}  // namespace

void bind_functions(nb::module_& m) {
  m.def(
      "function",
      [](const std::string& isa, const std::string& name, const AnyFloats& x) {
        const Kernels& kernels = find_kernels(isa);
        const Function f = function_named(name);
        return like(
            x, [&](const float* from, size_t n, float* to) { kernels.function(f, from, n, to); });
      },
      "isa"_a, "name"_a, "x"_a);
  m.def(
      "piecewise",
      [](const std::string& isa, const AnyFloats& x, const Array<float, 1>& breakpoint,
         const Array<float, 1>& slope, const Array<float, 1>& intercept) {
        const Kernels& kernels = find_kernels(isa);
        const Piecewise table =
            checked_piecewise(tensor(breakpoint), tensor(slope), tensor(intercept));
        return like(x, [&](const float* from, size_t n, float* to) {
          kernels.piecewise(table, from, n, to);
        });
      },
      "isa"_a, "x"_a, "breakpoint"_a, "slope"_a, "intercept"_a);
  m.def("table_exp", &by_segments<&Kernels::table_exp>, "isa"_a, "x"_a, "slope"_a, "intercept"_a);
  m.def("table_reciprocal", &by_segments<&Kernels::table_reciprocal>, "isa"_a, "x"_a, "slope"_a,
        "intercept"_a);
  m.def("table_rsqrt", &by_segments<&Kernels::table_rsqrt>, "isa"_a, "x"_a, "slope"_a,
        "intercept"_a);
}

}  // namespace lutra
