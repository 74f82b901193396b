// Python bindings of the steps of sequences, and of arithmetic with broadcasting.
#include "bindings/bindings.h"
#include "engine/steps/steps_broadcast.h"
#include "engine/steps/steps_matmul.h"
#include "engine/steps/steps_reduce.h"
#include "engine/steps/steps_sequence.h"

namespace lutra {

using namespace nb::literals;

namespace {

// Float32, or int8 with a scale for each row.
using TableArray = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

int embedding(Plan& p, int value, const TableArray& weight,
              const std::optional<Array<float, 1>>& scale) {
  const int64_t rows = static_cast<int64_t>(weight.shape(0));
  const int64_t features = static_cast<int64_t>(weight.shape(1));
  if (weight.dtype() == nb::dtype<float>()) {
    require(!scale, "an embedding of float32 takes no scale");
    return p.add_step(embedding_step(rows, features, static_cast<const float*>(weight.data())),
                      {value});
  }
  require(weight.dtype() == nb::dtype<int8_t>(), "an embedding is float32 or int8");
  require(scale && static_cast<int64_t>(scale->shape(0)) == rows,
          "an embedding of int8 needs a scale for each of its rows");
  return p.add_step(
      embedding_step(rows, features, static_cast<const int8_t*>(weight.data()), scale->data()),
      {value});
}

}  // namespace

void bind_sequence(nb::class_<Plan>& plan) {
  plan.def("embedding", &embedding, "value"_a, "weight"_a, "scale"_a.none() = nb::none())
      .def(
          "position_embedding",
          [](Plan& p, int value, Array<float, 2> weight) {
            return p.add_step(
                position_embedding_step(static_cast<int64_t>(weight.shape(0)),
                                        static_cast<int64_t>(weight.shape(1)), weight.data()),
                {value});
          },
          "value"_a, "weight"_a)
      .def(
          "masked_mean",
          [](Plan& p, int value, int mask) {
            return p.add_step(masked_mean_step(), {value, mask});
          },
          "value"_a, "mask"_a)
      .def(
          "gather",
          [](Plan& p, int value, Array<int32_t, 1> index, int axis) {
            const int32_t* const data = index.data();
            return p.add_step(gather_step({data, data + index.shape(0)}, axis), {value});
          },
          "value"_a, "index"_a, "axis"_a)
      .def(
          "pair",
          [](Plan& p, const std::string& name, int a, int b) {
            return p.add_step(pair_step(p.kernels(), arithmetic_of(name), true), {a, b});
          },
          "name"_a, "a"_a, "b"_a)
      .def(
          "affine_scalar",
          [](Plan& p, int value, float scale, float bias) {
            return p.add_step(affine_scalar_step(p.kernels(), scale, bias), {value});
          },
          "value"_a, "scale"_a, "bias"_a)
      .def(
          "cast", [](Plan& p, int value) { return p.add_step(cast_step(), {value}); }, "value"_a)
      .def(
          "matmul",
          [](Plan& p, int a, int b, bool transpose_a, bool transpose_b) {
            return p.add_step(matmul_step(p.kernels(), transpose_a, transpose_b), {a, b});
          },
          "a"_a, "b"_a, "transpose_a"_a, "transpose_b"_a)
      .def(
          "transpose",
          [](Plan& p, int value, std::vector<int> axes) {
            return p.add_step(transpose_step(std::move(axes)), {value});
          },
          "value"_a, "axes"_a)
      .def(
          "expand",
          [](Plan& p, int value, std::vector<int64_t> shape) {
            return p.add_step(expand_step(std::move(shape)), {value});
          },
          "value"_a, "shape"_a)
      .def(
          "l2_norm",
          [](Plan& p, int value, std::vector<int> axes, bool keepdims) {
            return p.add_step(l2_norm_step(axes, keepdims), {value});
          },
          "value"_a, "axes"_a, "keepdims"_a);
}

}  // namespace lutra
