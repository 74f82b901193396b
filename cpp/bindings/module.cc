// Python bindings: thin. Arrays come checked from Python; work runs without the GIL.
#include <bit>

#include "bindings/bindings.h"
#include "engine/core/limits.h"
#include "engine/core/op_registry.h"
#include "kernels/dispatch.h"

namespace lutra {

using namespace nb::literals;

namespace {

using FloatArray = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;

// Integer arithmetic, because compilers may turn that into vector code.
bool all_finite(const FloatArray& a) {
  const float* const data = a.data();
  const size_t n = a.size();
  uint32_t bad = 0;
  for (size_t i = 0; i < n; ++i) {
    constexpr uint32_t kExponent = 0x7f800000;
    bad |= (std::bit_cast<uint32_t>(data[i]) & kExponent) == kExponent ? 1u : 0u;
  }
  return bad == 0;
}

using Limit = std::variant<int64_t, Sizes>;

template <int64_t kCount>
Limit all_of(const int64_t (&list)[kCount]) {
  return Sizes(list, list + kCount);
}

// By the names of lutra.ops.limits, in lower case.
std::map<std::string, Limit> limits() {
  Sizes act_bits;
  for (int64_t b = kMinLookupActBits; b <= kMaxLookupActBits; ++b) act_bits.push_back(b);
  return {{"max_engine_rank", kMaxRank},
          {"max_extent", kMaxExtent},
          {"max_factor", kMaxFactor},
          {"max_act_bits", kMaxActBits},
          {"int8_max", kInt8Max},
          {"centroid_counts", all_of(kCentroidCounts)},
          {"max_subvector", kMaxSubvector},
          {"max_codebooks", kMaxCodebooks},
          {"lookup_act_bits", act_bits},
          {"min_weights", kMinWeights},
          {"max_weights", kMaxWeights},
          {"weight_bits", all_of(kWeightBits)},
          {"max_lookup_depth", kMaxLookupDepth},
          {"max_int8_depth", kMaxInt8Depth},
          {"lowbit_levels", all_of(kLowBitLevels)},
          {"max_lowbit_depth", kMaxLowBitDepth},
          {"max_lowbit_outputs", kMaxLowBitOutputs},
          {"function_entries", all_of(kFunctionEntries)}};
}

Dtype dtype(const InputArray& array) {
  if (array.dtype() == nb::dtype<int8_t>()) return Dtype::kInt8;
  if (array.dtype() == nb::dtype<uint8_t>()) return Dtype::kUint8;
  if (array.dtype() == nb::dtype<int32_t>()) return Dtype::kInt32;
  if (array.dtype() == nb::dtype<float>()) return Dtype::kFloat32;
  return Dtype::kOther;
}

}  // namespace

StepArgs step_args(const std::string& op, const Attrs& attrs, const Tensors& tensors) {
  StepArgs args;
  args.op = op;
  args.attrs = attrs;
  for (const auto& [name, array] : tensors) {
    TensorView view{dtype(array), {}, array.data()};
    for (size_t i = 0; i < array.ndim(); ++i) {
      view.shape.push_back(static_cast<int64_t>(array.shape(i)));
    }
    args.tensors[name] = std::move(view);
  }
  return args;
}

NB_MODULE(_engine, m) {
  m.doc() = "The native engine of lutra. Use lutra.Session; nothing here is public.";

  m.def("cpu_model", &cpu_model);
  m.def("cpu_features", &cpu_feature_names);
  auto names = [](const std::vector<const Kernels*>& list) {
    std::vector<std::string> out;
    for (const Kernels* k : list) out.emplace_back(k->name);
    return out;
  };
  m.def("compiled_isas", [names] { return names(compiled_kernels()); });
  m.def("runnable_isas", [names] { return names(runnable_kernels()); });

  m.def("limits", &limits);
  m.def("ops", [] { return op_registry().names(); });
  m.def("load_ops", &load_ops, "path"_a);

  m.def("all_finite", &all_finite, "x"_a);

  bind_layers(m);
  bind_lowbit(m);
  bind_functions(m);
  bind_plan(m);
}

}  // namespace lutra
