// Python bindings: thin. Arrays come checked from Python; work runs without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <bit>
#include <optional>
#include <utility>

#include "engine/lookup_training.h"
#include "engine/plan.h"
#include "engine/pq_training.h"
#include "engine/steps_basic.h"
#include "engine/steps_conv.h"
#include "engine/steps_image.h"
#include "engine/steps_reduce.h"
#include "kernels/dispatch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace lutra {
namespace {

template <class T, int kRank>
using Array = nb::ndarray<const T, nb::ndim<kRank>, nb::c_contig, nb::device::cpu>;
template <class T, int kRank>
using OutArray = nb::ndarray<T, nb::ndim<kRank>, nb::c_contig, nb::device::cpu>;
using Images = nb::ndarray<const float, nb::ndim<4>, nb::device::cpu>;
using OutImages = nb::ndarray<float, nb::ndim<4>, nb::device::cpu>;
using OutBytes = nb::ndarray<uint8_t, nb::ndim<4>, nb::device::cpu>;
using AnyFloats = nb::ndarray<const float, nb::device::cpu>;
using AnyBytes = nb::ndarray<const uint8_t, nb::device::cpu>;
using OutFloats = nb::ndarray<float, nb::device::cpu>;
using Pair = std::pair<int64_t, int64_t>;
using Limits = std::optional<std::pair<float, float>>;

ConvGeometry geometry(int64_t channels, Pair kernel, Pair stride, Pair padding, Pair dilation) {
  for (int64_t v : {kernel.first, kernel.second, stride.first, stride.second, dilation.first,
                    dilation.second}) {
    require(v >= 1, "kernel, stride and dilation must be at least 1");
  }
  require(padding.first >= 0 && padding.second >= 0, "padding must not be negative");
  return {.channels = channels,
          .kernel_h = kernel.first,
          .kernel_w = kernel.second,
          .stride_h = stride.first,
          .stride_w = stride.second,
          .pad_h = padding.first,
          .pad_w = padding.second,
          .dilation_h = dilation.first,
          .dilation_w = dilation.second};
}

Clamp clamp(const Limits& limits) {
  return limits ? Clamp{true, limits->first, limits->second} : Clamp{};
}

template <class T>
ImageView image(const T& a) {
  return {.data = const_cast<float*>(a.data()),
          .n = static_cast<int64_t>(a.shape(0)),
          .c = static_cast<int64_t>(a.shape(1)),
          .h = static_cast<int64_t>(a.shape(2)),
          .w = static_cast<int64_t>(a.shape(3)),
          .sn = a.stride(0),
          .sc = a.stride(1),
          .sh = a.stride(2),
          .sw = a.stride(3)};
}

using Centroids = std::optional<Array<uint8_t, 3>>;
using Splits = std::optional<Array<int32_t, 2>>;
using Thresholds = std::optional<Array<uint8_t, 2>>;

// Everything but the numbers of the tables that the two product-quantised operators share.
struct PqArrays {
  Array<int8_t, 3> tables;
  Array<float, 1> scale, bias;
  Quantization grid;
  const Centroids& centroids;
  const Splits& splits;
  const Thresholds& thresholds;
};

PqLayer pq_layer(const Kernels& kernels, const ConvGeometry& g, const PqArrays& a, bool few_rows) {
  const Array<int8_t, 3>& t = a.tables;
  require(a.scale.shape(0) == t.shape(2) && a.bias.shape(0) == t.shape(2),
          "scale and bias need one value per output");
  const int tree = (a.splits ? 1 : 0) + (a.thresholds ? 1 : 0);
  require(a.centroids ? tree == 0 : tree == 2,
          "a layer has centroids, or splits and thresholds; give one of the two");
  PqShape s{.books = static_cast<int32_t>(t.shape(0)),
            .centroids = static_cast<int32_t>(t.shape(1)),
            .outputs = static_cast<int32_t>(t.shape(2))};
  EncoderData e;
  if (a.centroids) {
    require(t.shape(0) == a.centroids->shape(0) && t.shape(1) == a.centroids->shape(1),
            "centroids and tables differ in codebooks or K");
    s.encoder = Encoder::kNearest;
    s.dim = static_cast<int32_t>(a.centroids->shape(2));
    e.centroids = a.centroids->data();
  } else {
    require(t.shape(0) == a.splits->shape(0) && t.shape(0) == a.thresholds->shape(0) &&
                t.shape(1) == a.thresholds->shape(1) + 1 &&
                t.shape(1) == size_t{1} << std::min<size_t>(a.splits->shape(1), 31),
            "splits, thresholds and tables differ in codebooks or K");
    s.encoder = Encoder::kTree;
    e.splits = a.splits->data();
    e.thresholds = a.thresholds->data();
  }
  return PqLayer(kernels, s, g, a.grid, e, t.data(), a.scale.data(), a.bias.data(), few_rows);
}

Int8Layer int8_layer(const Kernels& kernels, const ConvGeometry& g, int64_t outputs, int64_t groups,
                     const int8_t* weight, const Array<float, 1>& scale,
                     const Array<float, 1>& bias, const Quantization& grid) {
  require(static_cast<int64_t>(scale.shape(0)) == outputs &&
              static_cast<int64_t>(bias.shape(0)) == outputs,
          "scale and bias need one value per output");
  return Int8Layer(kernels, g, outputs, groups, grid, weight, scale.data(), bias.data());
}

// weight: indices (outputs, depth), one byte each.
LookupLayer lookup_layer(const Kernels& kernels, const ConvGeometry& g,
                         const Array<uint8_t, 2>& weight, const Array<int8_t, 2>& table,
                         const Array<float, 1>& scale, const Array<float, 1>& bias,
                         const Quantization& grid) {
  const auto text = [](size_t a, size_t b) {
    return "(" + std::to_string(a) + ", " + std::to_string(b) + ")";
  };
  require(static_cast<int64_t>(weight.shape(1)) == g.depth(),
          "lookup layer: weight indices of the shape " + text(weight.shape(0), weight.shape(1)) +
              " for rows of " + std::to_string(g.depth()) + " entries");
  require(
      scale.shape(0) == weight.shape(0) && bias.shape(0) == weight.shape(0),
      "lookup layer: scale and bias need one value per output, " + std::to_string(weight.shape(0)));
  require(grid.bits >= 2 && grid.bits <= 6,
          "lookup layer: activation bits must be 2..6, not " + std::to_string(grid.bits));
  require(table.shape(0) == size_t{1} << grid.bits,
          "lookup layer: a table of the shape " + text(table.shape(0), table.shape(1)) +
              " for activations of " + std::to_string(1 << grid.bits) + " levels");
  return LookupLayer(kernels, g, static_cast<int64_t>(weight.shape(0)), grid,
                     static_cast<int64_t>(table.shape(1)), table.data(), weight.data(),
                     scale.data(), bias.data());
}

std::vector<int> with_residual(int x, int residual) {
  return residual >= 0 ? std::vector<int>{x, residual} : std::vector<int>{x};
}

// Scratch of layers that run on their own. Grown once per calling thread and kept: a training step
// calls for every layer.
uint8_t* scratch(size_t needed) {
  thread_local AlignedBytes memory;
  thread_local size_t bytes = 0;
  if (needed > bytes) {
    memory = AlignedBytes(needed);
    bytes = needed;
  }
  return memory.data();
}

// A PQ layer on its own, for PyTorch's operators: any strides in, any strides out.
void run_layer(const PqLayer& layer, ThreadPool& pool, const Images& x, const OutImages& out,
               std::optional<OutArray<uint8_t, 2>> codes) {
  const ImageView in = image(x), y = image(out);
  const ConvGeometry& g = layer.geometry();
  require(in.c == g.channels && y.n == in.n && y.c == layer.shape().outputs &&
              y.h == g.out_h(in.h) && y.w == g.out_w(in.w) && y.h > 0 && y.w > 0,
          "input and output do not fit the layer");
  if (codes) {
    require(static_cast<int64_t>(codes->shape(0)) == layer.shape().books &&
                static_cast<int64_t>(codes->shape(1)) == y.n * y.h * y.w,
            "codes must have the shape (codebooks, rows)");
  }
  nb::gil_scoped_release release;
  PqLayer::Call call{.floats = &in, .codes = codes ? codes->data() : nullptr};
  call.output.view = y;
  const bool direct = TileOutput::direct(y);
  layer.run(call, scratch(layer.workspace_bytes(in.n, in.h, in.w, pool.threads(), direct)), pool);
}

// Whether two arrays have the same shape and the same strides where those matter.
template <class A, class B>
bool same_layout(const A& a, const B& b) {
  if (a.ndim() != b.ndim()) return false;
  for (size_t i = 0; i < a.ndim(); ++i) {
    if (a.shape(i) != b.shape(i)) return false;
    if (a.shape(i) > 1 && a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

// Whether its elements fill a piece of memory, in any order of the axes.
template <class A>
bool dense(const A& a) {
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, length
  for (size_t i = 0; i < a.ndim(); ++i) {
    if (a.shape(i) == 0) return true;
    if (a.shape(i) > 1) axes.push_back({a.stride(i), static_cast<int64_t>(a.shape(i))});
  }
  std::sort(axes.begin(), axes.end());
  int64_t next = 1;
  for (const auto& [stride, length] : axes) {
    if (stride != next) return false;
    next *= length;
  }
  return true;
}

// A lookup layer on its own, for PyTorch's operators: any strides in, any strides out.
void run_lookup(const LookupLayer& layer, ThreadPool& pool, const Images& x, const OutImages& out,
                std::optional<OutBytes> indices) {
  const ImageView in = image(x), y = image(out);
  const ConvGeometry& g = layer.geometry();
  require(in.c == g.channels && y.n == in.n && y.c == layer.outputs() && y.h == g.out_h(in.h) &&
              y.w == g.out_w(in.w) && y.h > 0 && y.w > 0,
          "lookup layer: input and output do not fit the layer");
  require(!indices || (same_layout(x, *indices) && dense(x)),
          "lookup layer: indices need the shape and the strides of x, and both without gaps");
  nb::gil_scoped_release release;
  LayerOutput output;
  output.view = y;
  const bool direct = TileOutput::direct(y);
  uint8_t* const memory = scratch(layer.workspace_bytes(in.n, in.h, in.w, pool.threads(), direct));
  if (indices) layer.quantize(in.data, in.pixels() * in.c, indices->data(), pool);
  if (indices && in.sw == 1 && in.sh == in.w) {  // lines that can be copied as they are
    layer.run(ByteView{indices->data(), in.n, in.c, in.h, in.w, in.sn, in.sc, in.sh, in.sw}, output,
              memory, pool);
  } else {
    layer.run(in, output, memory, pool);
  }
}

template <class T>
using Vector = nb::ndarray<nb::numpy, T, nb::ndim<1>>;

std::tuple<Vector<double>, Vector<int64_t>, double> lookup_gradients(const std::string& isa, ThreadPool& pool, const AnyFloats& x,
                           const AnyBytes& indices, const OutFloats& gradient, float low,
                           float high, int levels) {
  const Kernels& kernels = find_kernels(isa);
  require(same_layout(x, indices) && same_layout(x, gradient) && dense(x),
          "lookup_gradient: x, indices and gradient need the same shape and strides, without gaps");
  require(levels >= 1 && levels <= 256,
          "lookup_gradient: levels must be 1..256, not " + std::to_string(levels));
  LookupGradient sums;
  {
    nb::gil_scoped_release release;
    sums = lookup_gradient(kernels, x.data(), indices.data(), gradient.data(),
                           static_cast<int64_t>(x.size()), low, high, levels, pool);
  }
  int64_t counted = 0;
  for (const int64_t count : sums.counts) counted += count;
  require(counted == static_cast<int64_t>(x.size()),
          "lookup_gradient: an index is not below " + std::to_string(levels) + ", the levels");
  const auto array = [&](const auto& values) {
    using T = typename std::decay_t<decltype(values)>::value_type;
    T* const data = new T[static_cast<size_t>(levels)];
    std::copy(values.begin(), values.begin() + levels, data);
    const nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return Vector<T>(data, {static_cast<size_t>(levels)}, owner);
  };
  return {array(sums.cells), array(sums.counts), sums.inside};
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

void shapes_of(const std::vector<FloatArray>& inputs, Shapes& shapes,
               std::vector<const float*>& data) {
  for (const auto& a : inputs) {
    require(a.ndim() <= kMaxRank, "arrays of more than 6 axes are not supported");
    Shape s;
    for (size_t i = 0; i < a.ndim(); ++i) s[s.rank++] = static_cast<int64_t>(a.shape(i));
    shapes.push_back(s);
    data.push_back(a.data());
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
    Plan& plan, const std::vector<FloatArray>& inputs, int runs) {
  Shapes shapes;
  std::vector<const float*> data;
  shapes_of(inputs, shapes, data);
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

nb::list run_plan(Plan& plan, const std::vector<FloatArray>& inputs) {
  Shapes shapes;
  std::vector<const float*> data;
  shapes_of(inputs, shapes, data);
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

  nb::class_<PqLayer>(m, "PqLayer")
      .def(
          "__init__",
          [](PqLayer* self, const std::string& isa, Array<int8_t, 3> tables, Array<float, 1> scale,
             Array<float, 1> bias, float act_scale, int act_zero, int act_bits, int64_t channels,
             Pair kernel, Pair stride, Pair padding, Pair dilation, Centroids centroids,
             Splits splits, Thresholds thresholds) {
            const PqArrays arrays{tables,    scale,  bias,      {act_scale, act_zero, act_bits},
                                  centroids, splits, thresholds};
            new (self) PqLayer(pq_layer(find_kernels(isa),
                                        geometry(channels, kernel, stride, padding, dilation),
                                        arrays, false));
          },
          "isa"_a, "tables"_a, "scale"_a, "bias"_a, "act_scale"_a, "act_zero"_a, "act_bits"_a,
          "channels"_a, "kernel"_a, "stride"_a, "padding"_a, "dilation"_a,
          "centroids"_a.none() = nb::none(), "splits"_a.none() = nb::none(),
          "thresholds"_a.none() = nb::none())
      .def("run", &run_layer, "pool"_a, "x"_a, "out"_a, "codes"_a.none() = nb::none());

  m.def(
      "table_gradient",
      [](const std::string& isa, ThreadPool& pool, Array<uint8_t, 2> codes, Images gradient,
         OutArray<float, 3> out) {
        const ImageView g = image(gradient);
        require(codes.shape(0) == out.shape(0) &&
                    static_cast<int64_t>(codes.shape(1)) == g.n * g.h * g.w &&
                    static_cast<int64_t>(out.shape(2)) == g.c,
                "codes, gradient and out do not fit each other");
        const PqShape s{.books = static_cast<int32_t>(out.shape(0)),
                        .centroids = static_cast<int32_t>(out.shape(1)),
                        .dim = 1,
                        .outputs = static_cast<int32_t>(out.shape(2))};
        const Kernels& kernels = find_kernels(isa);
        nb::gil_scoped_release release;
        table_gradient(kernels, s, codes.data(), g, out.data(), pool);
      },
      "isa"_a, "pool"_a, "codes"_a, "gradient"_a, "out"_a);

  nb::class_<LookupLayer>(m, "LookupLayer")
      .def(
          "__init__",
          [](LookupLayer* self, const std::string& isa, Array<uint8_t, 2> weight,
             Array<int8_t, 2> table, Array<float, 1> scale, Array<float, 1> bias, float act_scale,
             int act_zero, int act_bits, int64_t channels, Pair kernel, Pair stride, Pair padding,
             Pair dilation) {
            new (self) LookupLayer(lookup_layer(
                find_kernels(isa), geometry(channels, kernel, stride, padding, dilation), weight,
                table, scale, bias, {act_scale, act_zero, act_bits}));
          },
          "isa"_a, "weight"_a, "table"_a, "scale"_a, "bias"_a, "act_scale"_a, "act_zero"_a,
          "act_bits"_a, "channels"_a, "kernel"_a, "stride"_a, "padding"_a, "dilation"_a)
      .def("run", &run_lookup, "pool"_a, "x"_a, "out"_a, "indices"_a.none() = nb::none());

  m.def("lookup_gradient", &lookup_gradients, "isa"_a, "pool"_a, "x"_a, "indices"_a, "gradient"_a,
        "low"_a, "high"_a, "levels"_a);

  m.def(
      "cluster_sums",
      [](const std::string& isa, ThreadPool& pool, Images x, Array<uint8_t, 2> codes,
         float act_scale, int act_zero, int act_bits, Pair kernel, Pair stride, Pair padding,
         Pair dilation, OutArray<int64_t, 3> sums, OutArray<int64_t, 2> counts) {
        const ImageView in = image(x);
        const ConvGeometry g = geometry(in.c, kernel, stride, padding, dilation);
        const PqShape s{.books = static_cast<int32_t>(sums.shape(0)),
                        .centroids = static_cast<int32_t>(sums.shape(1)),
                        .dim = static_cast<int32_t>(sums.shape(2)),
                        .outputs = 1};
        require(counts.shape(0) == sums.shape(0) && counts.shape(1) == sums.shape(1) &&
                    codes.shape(0) == sums.shape(0) &&
                    static_cast<int64_t>(codes.shape(1)) == in.n * g.out_h(in.h) * g.out_w(in.w) &&
                    (g.depth() + s.dim - 1) / s.dim == s.books,
                "codes, sums and counts do not fit the layer");
        const Kernels& kernels = find_kernels(isa);
        nb::gil_scoped_release release;
        cluster_sums(kernels, s, g, {.scale = act_scale, .zero = act_zero, .bits = act_bits}, in,
                     codes.data(), sums.data(), counts.data(), pool);
      },
      "isa"_a, "pool"_a, "x"_a, "codes"_a, "act_scale"_a, "act_zero"_a, "act_bits"_a, "kernel"_a,
      "stride"_a, "padding"_a, "dilation"_a, "sums"_a, "counts"_a);

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
      .def("input", &Plan::add_input)
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
          "add", [](Plan& p, int a, int b) { return p.add_step(add_step(), {a, b}); }, "a"_a, "b"_a)
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
          "softmax", [](Plan& p, int x, int axis) { return p.add_step(softmax_step(axis), {x}); },
          "x"_a, "axis"_a)
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
}

}  // namespace lutra
