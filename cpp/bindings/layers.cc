// Python bindings of layers that run on their own, and of what else training needs.
#include <algorithm>

#include "bindings/bindings.h"
#include "engine/training/lookup.h"
#include "engine/training/pq.h"
#include "engine/core/step.h"
#include "kernels/dispatch.h"

namespace lutra {

using namespace nb::literals;

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

LookupLayer lookup_layer(const Kernels& kernels, const ConvGeometry& g,
                         const Array<uint8_t, 2>& weight, const Array<int8_t, 2>& table,
                         const Array<float, 1>& scale, const Array<float, 1>& bias,
                         const Quantization& grid) {
  const auto text = [](size_t a, size_t b) {
    return std::string("(") + std::to_string(a) + ", " + std::to_string(b) + ")";
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
namespace {

using OutBytes = nb::ndarray<uint8_t, nb::ndim<4>, nb::device::cpu>;
using AnyFloats = nb::ndarray<const float, nb::device::cpu>;
using AnyBytes = nb::ndarray<const uint8_t, nb::device::cpu>;
using OutFloats = nb::ndarray<float, nb::device::cpu>;

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
  // Lines that can be copied as they are. Without padding they would be read in place, but what a
  // caller gives has no slack.
  if (indices && in.sw == 1 && in.sh == in.w && g.taps() > 1) {
    layer.run(ByteView{indices->data(), in.n, in.c, in.h, in.w, in.sn, in.sc, in.sh, in.sw}, output,
              memory, pool);
  } else {
    layer.run(in, output, memory, pool);
  }
}

template <class T>
using Vector = nb::ndarray<nb::numpy, T, nb::ndim<1>>;

std::tuple<Vector<double>, Vector<int64_t>, double> lookup_gradients(
    const std::string& isa, ThreadPool& pool, const AnyFloats& x, const AnyBytes& indices,
    const OutFloats& gradient, float low, float high, int levels) {
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
}  // namespace

void bind_layers(nb::module_& m) {
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
}

}  // namespace lutra
