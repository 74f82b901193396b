// Python bindings of plans.
#include "engine/core/plan.h"

#include "bindings/bindings.h"
#include "kernels/dispatch.h"

namespace lutra {

using namespace nb::literals;

namespace {

void shapes_of(const Plan& plan, const std::vector<InputArray>& inputs, Shapes& shapes,
               std::vector<const float*>& data) {
  require(inputs.size() == static_cast<size_t>(plan.input_count()), "wrong number of inputs");
  for (const auto& a : inputs) {
    const bool integers = plan.is_integer_input(static_cast<int>(data.size()));
    require(
        a.dtype() == (integers ? nb::dtype<int32_t>() : nb::dtype<float>()),
        "input " + std::to_string(data.size()) + " must be " + (integers ? "int32" : "float32"));
    require(a.ndim() <= kMaxRank, "arrays of more than 8 axes are not supported");
    Shape s;
    for (size_t i = 0; i < a.ndim(); ++i) s[s.rank++] = static_cast<int64_t>(a.shape(i));
    shapes.push_back(s);
    data.push_back(static_cast<const float*>(a.data()));
  }
}

Shapes shapes_of(const std::vector<std::vector<int64_t>>& all) {
  Shapes shapes;
  for (const auto& dims : all) {
    require(dims.size() <= kMaxRank, "arrays of more than 8 axes are not supported");
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

nb::list run_plan(Plan& plan, const std::vector<InputArray>& inputs, Cache* cache, int64_t first) {
  Shapes shapes;
  std::vector<const float*> data;
  shapes_of(plan, inputs, shapes, data);
  std::optional<Cache::Use> use;
  if (cache) {
    require(cache->plan() == &plan, "the cache is of another session");
    use.emplace(*cache);
    for (const Shape& s : shapes) {
      require(first >= 0 && first + s.batch() <= cache->sequences(),
              "sequences " + std::to_string(first) + ".." + std::to_string(first + s.batch() - 1) +
                  " are run, and the cache holds " + std::to_string(cache->sequences()));
    }
  }
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
    plan.execute(*context, data, targets, nullptr, cache, first);
    plan.release(std::move(context));
  }
  return results;
}

int add(Plan& plan, const std::string& op, std::vector<int> inputs, const Attrs& attrs,
        const Tensors& tensors, std::vector<Sizes> input_shapes, Sizes output_shape, int residual,
        std::optional<std::pair<float, float>> clamp, std::vector<int> planes) {
  StepArgs args = step_args(op, attrs, tensors);
  args.inputs = std::move(inputs);
  args.input_shapes = std::move(input_shapes);
  args.output_shape = std::move(output_shape);
  args.residual = residual;
  if (clamp) args.clamp = {true, clamp->first, clamp->second};
  args.planes = std::move(planes);
  return op_registry().build(plan, args);
}

}  // namespace

void bind_plan(nb::module_& m) {
  nb::class_<Cache>(m, "Cache")
      .def_prop_ro("sequences", &Cache::sequences)
      .def_prop_ro("nbytes", &Cache::bytes)
      .def("select", &Cache::select, "rows"_a);
  nb::class_<Plan>(m, "Plan")
      .def(
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
      .def("add", &add, "op"_a, "inputs"_a, "attrs"_a, "tensors"_a, nb::kw_only(), "input_shapes"_a,
           "output_shape"_a, "residual"_a = -1, "clamp"_a.none() = nb::none(),
           "planes"_a = std::vector<int>())
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
      .def("cache", &Plan::make_cache, "sequences"_a, nb::keep_alive<0, 1>())
      .def("run", &run_plan, "inputs"_a, "cache"_a.none() = nb::none(), "first"_a = 0);
}

}  // namespace lutra
