// What the parts of the bindings share: types of arrays, and arguments of operators.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <optional>
#include <utility>

#include "engine/core/step_args.h"

namespace lutra {

namespace nb = nanobind;

template <class T, int kRank>
using Array = nb::ndarray<const T, nb::ndim<kRank>, nb::c_contig, nb::device::cpu>;
template <class T, int kRank>
using OutArray = nb::ndarray<T, nb::ndim<kRank>, nb::c_contig, nb::device::cpu>;
// Of any dtype.
using InputArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

using Attrs = std::map<std::string, Attr>;
using Tensors = std::map<std::string, InputArray>;
// The arrays must live as long as the arguments.
StepArgs step_args(const std::string& op, const Attrs& attrs, const Tensors& tensors);

// Layers on their own and what else training needs, for PyTorch's operators.
void bind_layers(nb::module_& m);
// Matrices of low-bit weights.
void bind_lowbit(nb::module_& m);
void bind_plan(nb::module_& m);
// Functions of one variable and their tables.
void bind_functions(nb::module_& m);

}  // namespace lutra
