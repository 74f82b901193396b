// Python bindings: thin. Arrays come checked from Python; work runs without the GIL.
#include "bindings/bindings.h"

#include <bit>

#include "engine/steps/steps_basic.h"
#include "engine/steps/steps_broadcast.h"
#include "engine/steps/steps_conv.h"
#include "engine/steps/steps_image.h"
#include "engine/steps/steps_reduce.h"
#include "kernels/dispatch.h"

namespace lutra {

using namespace nb::literals;

namespace {

using Limits = std::optional<std::pair<float, float>>;

Clamp clamp(const Limits& limits) {
  return limits ? Clamp{true, limits->first, limits->second} : Clamp{};
}
Int8Layer int8_layer(const Kernels& kernels, const ConvGeometry& g, int64_t outputs, int64_t groups,
                     const int8_t* weight, const Array<float, 1>& scale,
                     const Array<float, 1>& bias, const Quantization& grid) {
  require(static_cast<int64_t>(scale.shape(0)) == outputs &&
              static_cast<int64_t>(bias.shape(0)) == outputs,
          "scale and bias need one value per output");
  return Int8Layer(kernels, g, outputs, groups, grid, weight, scale.data(), bias.data());
}
std::vector<int> with_residual(int x, int residual) {
  return residual >= 0 ? std::vector<int>{x, residual} : std::vector<int>{x};
}
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

// float32, or int32 where the plan has such an input
using InputArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

void shapes_of(const Plan& plan, const std::vector<InputArray>& inputs, Shapes& shapes,
               std::vector<const float*>& data) {
  require(inputs.size() == static_cast<size_t>(plan.input_count()), "wrong number of inputs");
  for (const auto& a : inputs) {
    const bool integers = plan.is_integer_input(static_cast<int>(data.size()));
    require(
        a.dtype() == (integers ? nb::dtype<int32_t>() : nb::dtype<float>()),
        "input " + std::to_string(data.size()) + " must be " + (integers ? "int32" : "float32"));
    require(a.ndim() <= kMaxRank, "arrays of more than 6 axes are not supported");
    Shape s;
    for (size_t i = 0; i < a.ndim(); ++i) s[s.rank++] = static_cast<int64_t>(a.shape(i));
    shapes.push_back(s);
    data.push_back(static_cast<const float*>(a.data()));
  }
}

Shapes shapes_of(const std::vector<std::vector<int64_t>>& all) {
  Shapes shapes;
  for (const auto& dims : all) {
    require(dims.size() <= kMaxRank, "arrays of more than 6 axes are not supported");
    Shape s;
    for (int64_t d : dims) s[s.rank++] = d;
    shapes.push_back(s);
  }
  return shapes;
}

using Described = std::vector<std::tuple<std::string, std::string, size_t>>;

// What the steps are, and seconds of every run and step.
std::pair<Described, std::vector<std::vector<double>>> profile_plan(
    Plan& plan, const std::vector<InputArray>& inputs, int runs) {
  Shapes shapes;
  std::vector<const float*> data;
  shapes_of(plan, inputs, shapes, data);
  std::unique_ptr<Plan::Context> context = plan.acquire(shapes);
  const std::vector<Plan::StepInfo> steps = plan.describe(*context);
  std::vector<std::vector<float>> memory;
  std::vector<float*> targets;
  for (size_t i = 0; i < context->outputs(); ++i) {
    memory.emplace_back(static_cast<size_t>(std::max<int64_t>(context->output_shape(i).size(), 1)));
    targets.push_back(memory.back().data());
  }
  std::vector<std::vector<double>> seconds(static_cast<size_t>(runs));
  {
    nb::gil_scoped_release release;
    for (auto& times : seconds) {
      times.resize(steps.size() + 2);
      plan.execute(*context, data, targets, times.data());
    }
    plan.release(std::move(context));
  }
  Described described;
  for (const Plan::StepInfo& s : steps) described.emplace_back(s.label, s.method, s.bytes);
  return {described, seconds};
}

nb::list run_plan(Plan& plan, const std::vector<InputArray>& inputs) {
  Shapes shapes;
  std::vector<const float*> data;
  shapes_of(plan, inputs, shapes, data);
  std::unique_ptr<Plan::Context> context;
  {
    nb::gil_scoped_release release;
    context = plan.acquire(shapes);
  }
  nb::list results;
  std::vector<float*> targets;
  for (size_t i = 0; i < context->outputs(); ++i) {
    const Shape& s = context->output_shape(i);
    std::vector<size_t> dims(s.dims.begin(), s.dims.begin() + s.rank);
    struct Lease {
      std::shared_ptr<OutputPool> pool;
      OutputPool::Buffer buffer;
    };
    const size_t size = static_cast<size_t>(std::max<int64_t>(s.size(), 1));
    auto lease = std::make_unique<Lease>(Lease{plan.output_pool(), plan.output_pool()->take(size)});
    float* const memory = lease->buffer.data.get();
    nb::capsule owner(lease.release(), [](void* p) noexcept {
      const std::unique_ptr<Lease> dropped(static_cast<Lease*>(p));
      dropped->pool->give_back(std::move(dropped->buffer));
    });
    targets.push_back(memory);
    results.append(nb::ndarray<nb::numpy, float>(memory, dims.size(), dims.data(), owner).cast());
  }
  {
    nb::gil_scoped_release release;
    plan.execute(*context, data, targets);
    plan.release(std::move(context));
  }
  return results;
}

}  // namespace

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

  m.def("all_finite", &all_finite, "x"_a);

  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::init<int>(), "threads"_a)
      .def_prop_ro("threads", &ThreadPool::threads);
  bind_layers(m);
  bind_functions(m);

  nb::class_<Plan> plan(m, "Plan");
  plan.def(
          "__init__",
          [](Plan* self, const std::string& isa, int threads) {
            require(threads >= 1, "threads must be at least 1");
            new (self) Plan(find_kernels(isa), threads);
          },
          "isa"_a, "threads"_a)
      .def_prop_ro("isa", [](const Plan& p) { return std::string(p.kernels().name); })
      .def_prop_ro("threads", &Plan::threads)
      .def(
          "input",
          [](Plan& p, const std::string& dtype) {
            require(dtype == "float32" || dtype == "int32",
                    "an input is float32 or int32, not " + dtype);
            return p.add_input(dtype == "int32");
          },
          "dtype"_a = "float32")
      .def("label", &Plan::set_label, "name"_a)
      .def(
          "pq_conv2d",
          [](Plan& p, int x, Array<int8_t, 3> tables, Array<float, 1> scale, Array<float, 1> bias,
             float act_scale, int act_zero, int act_bits, int64_t channels, Pair kernel,
             Pair stride, Pair padding, Pair dilation, Centroids centroids, Splits splits,
             Thresholds thresholds, int residual, Limits limits) {
            const ConvGeometry g = geometry(channels, kernel, stride, padding, dilation);
            const PqArrays arrays{tables,    scale,  bias,      {act_scale, act_zero, act_bits},
                                  centroids, splits, thresholds};
            PqLayer layer = pq_layer(p.kernels(), g, arrays, false);
            const int bytes = p.quantized(x, arrays.grid);
            return p.add_step(
                std::make_unique<PqStep>(std::move(layer), false, residual >= 0, clamp(limits)),
                with_residual(bytes, residual));
          },
          "x"_a, "tables"_a, "scale"_a, "bias"_a, "act_scale"_a, "act_zero"_a, "act_bits"_a,
          "channels"_a, "kernel"_a, "stride"_a, "padding"_a, "dilation"_a,
          "centroids"_a.none() = nb::none(), "splits"_a.none() = nb::none(),
          "thresholds"_a.none() = nb::none(), "residual"_a = -1, "clamp"_a.none() = nb::none())
      .def(
          "pq_linear",
          [](Plan& p, int x, Array<int8_t, 3> tables, Array<float, 1> scale, Array<float, 1> bias,
             float act_scale, int act_zero, int act_bits, int64_t features, Centroids centroids,
             Splits splits, Thresholds thresholds, int residual, Limits limits) {
            const PqArrays arrays{tables,    scale,  bias,      {act_scale, act_zero, act_bits},
                                  centroids, splits, thresholds};
            PqLayer layer = pq_layer(p.kernels(), {.channels = features}, arrays, true);
            const int bytes = p.quantized(x, arrays.grid);
            return p.add_step(
                std::make_unique<PqStep>(std::move(layer), true, residual >= 0, clamp(limits)),
                with_residual(bytes, residual));
          },
          "x"_a, "tables"_a, "scale"_a, "bias"_a, "act_scale"_a, "act_zero"_a, "act_bits"_a,
          "features"_a, "centroids"_a.none() = nb::none(), "splits"_a.none() = nb::none(),
          "thresholds"_a.none() = nb::none(), "residual"_a = -1, "clamp"_a.none() = nb::none())
      .def(
          "int8_conv2d",
          [](Plan& p, int x, Array<int8_t, 4> weight, Array<float, 1> scale, Array<float, 1> bias,
             float act_scale, int act_zero, int act_bits, Pair stride, Pair padding, Pair dilation,
             int64_t groups, int residual, Limits limits) {
            require(groups >= 1, "groups must be at least 1");
            const int64_t channels = static_cast<int64_t>(weight.shape(1)) * groups;
            const Pair kernel{static_cast<int64_t>(weight.shape(2)),
                              static_cast<int64_t>(weight.shape(3))};
            const Quantization grid{act_scale, act_zero, act_bits};
            Int8Layer layer = int8_layer(
                p.kernels(), geometry(channels, kernel, stride, padding, dilation),
                static_cast<int64_t>(weight.shape(0)), groups, weight.data(), scale, bias, grid);
            const int bytes = p.quantized(x, grid);
            return p.add_step(
                std::make_unique<Int8Step>(std::move(layer), false, residual >= 0, clamp(limits)),
                with_residual(bytes, residual));
          },
          "x"_a, "weight"_a, "scale"_a, "bias"_a, "act_scale"_a, "act_zero"_a, "act_bits"_a,
          "stride"_a, "padding"_a, "dilation"_a, "groups"_a, "residual"_a = -1,
          "clamp"_a.none() = nb::none())
      .def(
          "int8_linear",
          [](Plan& p, int x, Array<int8_t, 2> weight, Array<float, 1> scale, Array<float, 1> bias,
             float act_scale, int act_zero, int act_bits, int residual, Limits limits) {
            const Quantization grid{act_scale, act_zero, act_bits};
            Int8Layer layer = int8_layer(
                p.kernels(), {.channels = static_cast<int64_t>(weight.shape(1))},
                static_cast<int64_t>(weight.shape(0)), 1, weight.data(), scale, bias, grid);
            const int bytes = p.quantized(x, grid);
            return p.add_step(
                std::make_unique<Int8Step>(std::move(layer), true, residual >= 0, clamp(limits)),
                with_residual(bytes, residual));
          },
          "x"_a, "weight"_a, "scale"_a, "bias"_a, "act_scale"_a, "act_zero"_a, "act_bits"_a,
          "residual"_a = -1, "clamp"_a.none() = nb::none())
      .def(
          "lookup_conv2d",
          [](Plan& p, int x, Array<uint8_t, 2> weight, Array<int8_t, 2> table,
             Array<float, 1> scale, Array<float, 1> bias, float act_scale, int act_zero,
             int act_bits, int64_t channels, Pair kernel, Pair stride, Pair padding, Pair dilation,
             int residual, Limits limits) {
            const Quantization grid{act_scale, act_zero, act_bits};
            LookupLayer layer =
                lookup_layer(p.kernels(), geometry(channels, kernel, stride, padding, dilation),
                             weight, table, scale, bias, grid);
            const int bytes = p.quantized(x, grid);
            return p.add_step(
                std::make_unique<LookupStep>(std::move(layer), false, residual >= 0, clamp(limits)),
                with_residual(bytes, residual));
          },
          "x"_a, "weight"_a, "table"_a, "scale"_a, "bias"_a, "act_scale"_a, "act_zero"_a,
          "act_bits"_a, "channels"_a, "kernel"_a, "stride"_a, "padding"_a, "dilation"_a,
          "residual"_a = -1, "clamp"_a.none() = nb::none())
      .def(
          "lookup_linear",
          [](Plan& p, int x, Array<uint8_t, 2> weight, Array<int8_t, 2> table,
             Array<float, 1> scale, Array<float, 1> bias, float act_scale, int act_zero,
             int act_bits, int residual, Limits limits) {
            const Quantization grid{act_scale, act_zero, act_bits};
            LookupLayer layer =
                lookup_layer(p.kernels(), {.channels = static_cast<int64_t>(weight.shape(1))},
                             weight, table, scale, bias, grid);
            const int bytes = p.quantized(x, grid);
            return p.add_step(
                std::make_unique<LookupStep>(std::move(layer), true, residual >= 0, clamp(limits)),
                with_residual(bytes, residual));
          },
          "x"_a, "weight"_a, "table"_a, "scale"_a, "bias"_a, "act_scale"_a, "act_zero"_a,
          "act_bits"_a, "residual"_a = -1, "clamp"_a.none() = nb::none())
      .def(
          "conv2d",
          [](Plan& p, int x, Array<float, 4> weight, Array<float, 1> bias, Pair stride,
             Pair padding, Pair dilation, int64_t groups, int residual, Limits limits) {
            require(groups >= 1, "groups must be at least 1");
            require(bias.shape(0) == weight.shape(0), "bias needs one value per output");
            const int64_t channels = static_cast<int64_t>(weight.shape(1)) * groups;
            const Pair kernel{static_cast<int64_t>(weight.shape(2)),
                              static_cast<int64_t>(weight.shape(3))};
            return p.add_step(
                std::make_unique<ConvStep>(
                    p.kernels(), geometry(channels, kernel, stride, padding, dilation),
                    static_cast<int64_t>(weight.shape(0)), groups, weight.data(), bias.data(),
                    residual >= 0, clamp(limits)),
                with_residual(x, residual));
          },
          "x"_a, "weight"_a, "bias"_a, "stride"_a, "padding"_a, "dilation"_a, "groups"_a,
          "residual"_a = -1, "clamp"_a.none() = nb::none())
      .def(
          "linear",
          [](Plan& p, int x, Array<float, 2> weight, Array<float, 1> bias, int residual,
             Limits limits) {
            require(bias.shape(0) == weight.shape(0), "bias needs one value per output");
            return p.add_step(
                std::make_unique<LinearStep>(p.kernels(), static_cast<int64_t>(weight.shape(1)),
                                             static_cast<int64_t>(weight.shape(0)), weight.data(),
                                             bias.data(), residual >= 0, clamp(limits)),
                with_residual(x, residual));
          },
          "x"_a, "weight"_a, "bias"_a, "residual"_a = -1, "clamp"_a.none() = nb::none())
      .def(
          "clamp",
          [](Plan& p, int x, float low, float high) {
            return p.add_step(clamp_step(low, high), {x});
          },
          "x"_a, "low"_a, "high"_a)
      .def(
          "add",
          [](Plan& p, int a, int b) {
            return p.add_step(pair_step(p.kernels(), Arithmetic::kAdd, false), {a, b});
          },
          "a"_a, "b"_a)
      .def(
          "mul",
          [](Plan& p, int a, int b) {
            return p.add_step(pair_step(p.kernels(), Arithmetic::kMul, false), {a, b});
          },
          "a"_a, "b"_a)
      .def(
          "affine",
          [](Plan& p, int x, Array<float, 1> scale, Array<float, 1> bias) {
            require(scale.shape(0) == bias.shape(0), "scale and bias differ in length");
            const size_t n = scale.shape(0);
            return p.add_step(
                affine_step({scale.data(), scale.data() + n}, {bias.data(), bias.data() + n}), {x});
          },
          "x"_a, "scale"_a, "bias"_a)
      .def(
          "mean",
          [](Plan& p, int x, std::vector<int> axes, bool keepdims) {
            return p.add_step(mean_step(std::move(axes), keepdims), {x});
          },
          "x"_a, "axes"_a, "keepdims"_a)
      .def(
          "max",
          [](Plan& p, int x, std::vector<int> axes, bool keepdims) {
            return p.add_step(max_step(axes, keepdims), {x});
          },
          "x"_a, "axes"_a, "keepdims"_a)
      .def(
          "pixel_shuffle",
          [](Plan& p, int x, int64_t factor) {
            return p.add_step(pixel_shuffle_step(factor), {x});
          },
          "x"_a, "factor"_a)
      .def(
          "upsample",
          [](Plan& p, int x, const std::string& mode, Pair size, std::pair<double, double> scale,
             bool align_corners, int like) {
            const Upsampling settings{.mode = upsample_mode(mode),
                                      .height = size.first,
                                      .width = size.second,
                                      .scale_h = scale.first,
                                      .scale_w = scale.second,
                                      .align_corners = align_corners,
                                      .like = like >= 0};
            return p.add_step(upsample_step(settings), with_residual(x, like));
          },
          "x"_a, "mode"_a, "size"_a, "scale"_a, "align_corners"_a, "like"_a = -1)
      .def(
          "reshape",
          [](Plan& p, int x, std::vector<int64_t> shape) {
            return p.add_step(reshape_step(std::move(shape)), {x});
          },
          "x"_a, "shape"_a)
      .def(
          "pad",
          [](Plan& p, int x, std::vector<int64_t> before, std::vector<int64_t> after, float value) {
            return p.add_step(pad_step(std::move(before), std::move(after), value), {x});
          },
          "x"_a, "before"_a, "after"_a, "value"_a)
      .def(
          "slice",
          [](Plan& p, int x, int axis, int64_t start, int64_t stop, int64_t step) {
            return p.add_step(slice_step(axis, start, stop, step), {x});
          },
          "x"_a, "axis"_a, "start"_a, "stop"_a, "step"_a)
      .def(
          "concat",
          [](Plan& p, std::vector<int> xs, int axis) {
            return p.add_step(concat_step(axis), std::move(xs));
          },
          "xs"_a, "axis"_a)
      .def(
          "pool",
          [](Plan& p, int x, bool average, Pair kernel, Pair stride, Pair padding, Pair dilation,
             bool ceil_mode, bool count_include_pad) {
            return p.add_step(pool_step(average ? Pool::kAverage : Pool::kMax,
                                        geometry(1, kernel, stride, padding, dilation), ceil_mode,
                                        count_include_pad),
                              {x});
          },
          "x"_a, "average"_a, "kernel"_a, "stride"_a, "padding"_a, "dilation"_a, "ceil_mode"_a,
          "count_include_pad"_a)
      .def(
          "adaptive_pool",
          [](Plan& p, int x, bool average, Pair size) {
            return p.add_step(
                adaptive_pool_step(average ? Pool::kAverage : Pool::kMax, size.first, size.second),
                {x});
          },
          "x"_a, "average"_a, "size"_a)
      .def("finish", &Plan::finish, "outputs"_a)
      .def(
          "arena_bytes",
          [](const Plan& p, const std::vector<std::vector<int64_t>>& shapes) {
            return p.arena_bytes(shapes_of(shapes));
          },
          "input_shapes"_a)
      .def(
          "prepare",
          [](Plan& p, const std::vector<std::vector<int64_t>>& shapes) {
            p.release(p.acquire(shapes_of(shapes)));
          },
          "input_shapes"_a)
      .def("profile", &profile_plan, "inputs"_a, "runs"_a)
      .def("run", &run_plan, "inputs"_a);
  bind_sequence(plan);
  bind_function_steps(plan);
}

}  // namespace lutra
