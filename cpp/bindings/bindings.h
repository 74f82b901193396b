// What the parts of the bindings share: array types, and layers made from arrays.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <utility>

#include "engine/layers/lookup.h"
#include "engine/core/plan.h"
#include "engine/layers/pq.h"

namespace lutra {

namespace nb = nanobind;

template <class T, int kRank>
using Array = nb::ndarray<const T, nb::ndim<kRank>, nb::c_contig, nb::device::cpu>;
template <class T, int kRank>
using OutArray = nb::ndarray<T, nb::ndim<kRank>, nb::c_contig, nb::device::cpu>;
using Images = nb::ndarray<const float, nb::ndim<4>, nb::device::cpu>;
using OutImages = nb::ndarray<float, nb::ndim<4>, nb::device::cpu>;
using Pair = std::pair<int64_t, int64_t>;
using Centroids = std::optional<Array<uint8_t, 3>>;
using Splits = std::optional<Array<int32_t, 2>>;
using Thresholds = std::optional<Array<uint8_t, 2>>;

ConvGeometry geometry(int64_t channels, Pair kernel, Pair stride, Pair padding, Pair dilation);

// Everything but the numbers of the tables that the two product-quantised operators share.
struct PqArrays {
  Array<int8_t, 3> tables;
  Array<float, 1> scale, bias;
  Quantization grid;
  const Centroids& centroids;
  const Splits& splits;
  const Thresholds& thresholds;
};

PqLayer pq_layer(const Kernels& kernels, const ConvGeometry& g, const PqArrays& a, bool few_rows);

// weight: indices (outputs, depth), one byte each.
LookupLayer lookup_layer(const Kernels& kernels, const ConvGeometry& g,
                         const Array<uint8_t, 2>& weight, const Array<int8_t, 2>& table,
                         const Array<float, 1>& scale, const Array<float, 1>& bias,
                         const Quantization& grid);

// Layers on their own and what else training needs, for PyTorch's operators.
void bind_layers(nb::module_& m);

// Steps of plans beside those of images.
void bind_sequence(nb::class_<Plan>& plan);
void bind_function_steps(nb::class_<Plan>& plan);

// Functions of one variable and their tables.
void bind_functions(nb::module_& m);

}  // namespace lutra
