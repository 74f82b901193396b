// Python bindings of layers that run on their own, and of what else training needs.
#include <algorithm>

#include "bindings/bindings.h"
#include "engine/layers/layer.h"
#include "engine/training/lookup.h"
#include "engine/training/pq.h"
#include "kernels/dispatch.h"

namespace lutra {

using namespace nb::literals;

namespace {

using Images = nb::ndarray<const float, nb::ndim<4>, nb::device::cpu>;
using OutImages = nb::ndarray<float, nb::ndim<4>, nb::device::cpu>;
using OutBytes = nb::ndarray<uint8_t, nb::device::cpu>;
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

struct AloneLayer {
  std::unique_ptr<Layer> layer;
};

// For PyTorch's operators: any strides in, any strides out.
void run_layer(const AloneLayer& alone, ThreadPool& pool, const Images& x, const OutImages& out,
               const std::optional<OutBytes>& codes) {
  const Layer& layer = *alone.layer;
  const ImageView in = image(x), y = image(out);
  const ConvGeometry& g = layer.geometry();
  const int64_t rows = y.pixels();
  require(in.c == g.channels && y.n == in.n && y.c == layer.outputs() && y.h == g.out_h(in.h) &&
              y.w == g.out_w(in.w) && y.h > 0 && y.w > 0,
          "input and output do not fit the layer");
  if (codes) {
    Codes place{.data = codes->data()};
    for (size_t i = 0; i < codes->ndim(); ++i) {
      place.shape.push_back(static_cast<int64_t>(codes->shape(i)));
      place.strides.push_back(codes->stride(i));
    }
    layer.check_codes(in, rows, place);
  }
  nb::gil_scoped_release release;
  LayerOutput output;
  output.view = y;
  const bool direct = TileOutput::direct(y);
  layer.prepare(rows);
  uint8_t* const memory = scratch(layer.workspace_bytes(in.n, in.h, in.w, pool.threads(), direct));
  layer.run(in, output, codes ? codes->data() : nullptr, memory, pool);
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
  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::init<int>(), "threads"_a)
      .def_prop_ro("threads", &ThreadPool::threads);

  nb::class_<AloneLayer>(m, "Layer")
      .def(
          "__init__",
          [](AloneLayer* self, const std::string& op, const std::string& isa, const Attrs& attrs,
             const Tensors& tensors) {
            const Kernels& kernels = find_kernels(isa);
            new (self) AloneLayer{op_registry().layer(kernels, step_args(op, attrs, tensors))};
          },
          "op"_a, "isa"_a, "attrs"_a, "tensors"_a)
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
        const PqShape s{.codebooks = static_cast<int32_t>(out.shape(0)),
                        .centroids = static_cast<int32_t>(out.shape(1)),
                        .dim = 1,
                        .outputs = static_cast<int32_t>(out.shape(2))};
        const Kernels& kernels = find_kernels(isa);
        nb::gil_scoped_release release;
        table_gradient(kernels, s, codes.data(), g, out.data(), pool);
      },
      "isa"_a, "pool"_a, "codes"_a, "gradient"_a, "out"_a);

  m.def(
      "code_pairs",
      [](ThreadPool& pool, Array<uint8_t, 2> codes, int centroids, OutArray<int32_t, 2> counts) {
        const int64_t codebooks = static_cast<int64_t>(codes.shape(0));
        const int64_t rows = static_cast<int64_t>(codes.shape(1));
        require(centroids >= 1 && centroids <= 64, "centroids are not 1 to 64");
        require(static_cast<int64_t>(counts.shape(0)) == codebooks * centroids &&
                    counts.shape(1) == counts.shape(0),
                "codes and counts do not fit each other");
        require(std::all_of(codes.data(), codes.data() + codebooks * rows,
                            [&](uint8_t code) { return code < centroids; }),
                "a code is not below centroids");
        nb::gil_scoped_release release;
        code_pairs(codes.data(), codebooks, rows, centroids, counts.data(), pool);
      },
      "pool"_a, "codes"_a, "centroids"_a, "counts"_a);

  m.def("lookup_gradient", &lookup_gradients, "isa"_a, "pool"_a, "x"_a, "indices"_a, "gradient"_a,
        "low"_a, "high"_a, "levels"_a);

  m.def(
      "cluster_sums",
      [](const std::string& isa, ThreadPool& pool, Images x, Array<uint8_t, 2> codes,
         float act_scale, int act_zero, int act_bits, Pair kernel, Pair stride, Pair padding,
         Pair dilation, OutArray<int64_t, 3> sums, OutArray<int64_t, 2> counts) {
        const ImageView in = image(x);
        const ConvGeometry g =
            conv_geometry(in.c, kernel, stride, {padding[0], padding[1]}, dilation);
        const PqShape s{.codebooks = static_cast<int32_t>(sums.shape(0)),
                        .centroids = static_cast<int32_t>(sums.shape(1)),
                        .dim = static_cast<int32_t>(sums.shape(2)),
                        .outputs = 1};
        require(counts.shape(0) == sums.shape(0) && counts.shape(1) == sums.shape(1) &&
                    codes.shape(0) == sums.shape(0) &&
                    static_cast<int64_t>(codes.shape(1)) == in.n * g.out_h(in.h) * g.out_w(in.w) &&
                    (g.depth() + s.dim - 1) / s.dim == s.codebooks,
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
