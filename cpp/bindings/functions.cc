// Python bindings of functions: kernels on arrays, and steps of plans.
#include "bindings/bindings.h"
#include "engine/steps/steps_functions.h"
#include "engine/steps/steps_norm.h"
#include "kernels/dispatch.h"

namespace lutra {

using namespace nb::literals;

namespace {

using AnyFloats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Lines = std::optional<std::pair<Array<float, 1>, Array<float, 1>>>;  // slope, intercept
using NewFloats = nb::ndarray<nb::numpy, float>;

Function function_named(const std::string& name) {
  static const std::pair<const char*, Function> all[] = {
      {"gelu", Function::kGelu},       {"gelu_tanh", Function::kGeluTanh},
      {"silu", Function::kSilu},       {"tanh", Function::kTanh},
      {"sigmoid", Function::kSigmoid}, {"exp", Function::kExp},
      {"erf", Function::kErf},         {"sqrt", Function::kSqrt},
      {"rsqrt", Function::kRsqrt},     {"reciprocal", Function::kReciprocal}};
  std::string list;
  for (const auto& [known, f] : all) {
    if (name == known) return f;
    list += (list.empty() ? "" : ", ") + std::string(known);
  }
  throw std::invalid_argument("there is no function '" + name + "'; choose one of: " + list);
}

int32_t checked_entries(const char* what, size_t slopes, size_t intercepts) {
  require((slopes == 8 || slopes == 16 || slopes == 32) && intercepts == slopes,
          std::string(what) + ": a table needs 8, 16 or 32 slopes and as many intercepts, not " +
              std::to_string(slopes) + " and " + std::to_string(intercepts));
  return static_cast<int32_t>(slopes);
}

Segments segments(const char* what, const Array<float, 1>& slope,
                  const Array<float, 1>& intercept) {
  return {.entries = checked_entries(what, slope.shape(0), intercept.shape(0)),
          .slope = slope.data(),
          .intercept = intercept.data()};
}

Piecewise pieces(const Array<float, 1>& breakpoint, const Array<float, 1>& slope,
                 const Array<float, 1>& intercept) {
  const int32_t entries = checked_entries("piecewise", slope.shape(0), intercept.shape(0));
  require(static_cast<int32_t>(breakpoint.shape(0)) == entries - 1,
          "piecewise: " + std::to_string(entries) + " entries need " + std::to_string(entries - 1) +
              " breakpoints, not " + std::to_string(breakpoint.shape(0)));
  for (int32_t i = 0; i < entries - 1; ++i) {
    const float* const b = breakpoint.data();
    require(b[i] == b[i] && (i == 0 || b[i - 1] <= b[i]),
            "piecewise: the breakpoints must ascend, and entry " + std::to_string(i) + " does not");
  }
  return {.entries = entries,
          .breakpoint = breakpoint.data(),
          .slope = slope.data(),
          .intercept = intercept.data()};
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
  const Segments table = segments("table", slope, intercept);
  return like(
      x, [&](const float* from, size_t n, float* to) { (kernels.*kKernel)(table, from, n, to); });
}

std::vector<float> vector_of(const Array<float, 1>& a) { return {a.data(), a.data() + a.shape(0)}; }

LineTable line_table(const char* what, const Lines& lines) {
  if (!lines) return {};
  checked_entries(what, lines->first.shape(0), lines->second.shape(0));
  return {vector_of(lines->first), vector_of(lines->second)};
}

int attention(Plan& p, int q, int k, int v, int mask, int64_t heads, float scale, bool causal,
              std::tuple<int64_t, int64_t, int64_t> offsets, std::optional<int64_t> width,
              const Lines& exp, const Lines& reciprocal) {
  require(exp.has_value() == reciprocal.has_value(),
          "attention: exp and reciprocal are both tables, or neither is");
  std::vector<int> inputs{q, k, v};
  if (mask >= 0) inputs.push_back(mask);
  return p.add_step(
      attention_step(p.kernels(),
                     {.heads = heads,
                      .scale = scale,
                      .causal = causal,
                      .offset = {std::get<0>(offsets), std::get<1>(offsets), std::get<2>(offsets)},
                      .width = width.value_or(-1),
                      .exp = line_table("attention", exp),
                      .reciprocal = line_table("attention", reciprocal)}),
      std::move(inputs));
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
        const Piecewise table = pieces(breakpoint, slope, intercept);
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

void bind_function_steps(nb::class_<Plan>& plan) {
  plan.def(
          "function",
          [](Plan& p, int value, const std::string& name) {
            return p.add_step(function_step(p.kernels(), function_named(name)), {value});
          },
          "value"_a, "name"_a)
      .def(
          "piecewise",
          [](Plan& p, int value, const Array<float, 1>& breakpoint, const Array<float, 1>& slope,
             const Array<float, 1>& intercept) {
            return p.add_step(piecewise_step(p.kernels(), pieces(breakpoint, slope, intercept)),
                              {value});
          },
          "value"_a, "breakpoint"_a, "slope"_a, "intercept"_a)
      .def(
          "layer_norm",
          [](Plan& p, int value, const Array<float, 1>& weight, const Array<float, 1>& bias,
             float eps, const Lines& rsqrt) {
            require(weight.shape(0) == bias.shape(0),
                    "layer_norm: weight and bias differ in length");
            return p.add_step(norm_step(p.kernels(), true, vector_of(weight), vector_of(bias), eps,
                                        line_table("layer_norm", rsqrt)),
                              {value});
          },
          "value"_a, "weight"_a, "bias"_a, "eps"_a, "rsqrt"_a.none() = nb::none())
      .def(
          "rms_norm",
          [](Plan& p, int value, const Array<float, 1>& weight, float eps, const Lines& rsqrt) {
            return p.add_step(norm_step(p.kernels(), false, vector_of(weight), {}, eps,
                                        line_table("rms_norm", rsqrt)),
                              {value});
          },
          "value"_a, "weight"_a, "eps"_a, "rsqrt"_a.none() = nb::none())
      .def(
          "softmax",
          [](Plan& p, int x, int axis, const Lines& exp, const Lines& reciprocal) {
            require(exp.has_value() == reciprocal.has_value(),
                    "softmax: exp and reciprocal are both tables, or neither is");
            return p.add_step(softmax_step(p.kernels(), axis, line_table("softmax", exp),
                                           line_table("softmax", reciprocal)),
                              {x});
          },
          "x"_a, "axis"_a, "exp"_a.none() = nb::none(), "reciprocal"_a.none() = nb::none())
      .def("attention", &attention, "q"_a, "k"_a, "v"_a, "mask"_a = -1, nb::kw_only(), "heads"_a,
           "scale"_a, "causal"_a, "offsets"_a = nb::make_tuple(0, 0, 0),
           "widths"_a.none() = nb::none(), "exp"_a.none() = nb::none(),
           "reciprocal"_a.none() = nb::none());
}

}  // namespace lutra
