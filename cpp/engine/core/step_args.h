// What an operator's step is made from: attributes and tensors, fetched by name.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include "engine/core/quantization.h"
#include "engine/core/step.h"

namespace lutra {

using Sizes = std::vector<int64_t>;
using Attr = std::variant<bool, int64_t, double, std::string, Sizes>;

enum class Dtype : int32_t { kInt8, kUint8, kInt32, kFloat32, kOther };

template <class T>
constexpr Dtype dtype_of() {
  if constexpr (std::is_same_v<T, int8_t>) return Dtype::kInt8;
  if constexpr (std::is_same_v<T, uint8_t>) return Dtype::kUint8;
  if constexpr (std::is_same_v<T, int32_t>) return Dtype::kInt32;
  if constexpr (std::is_same_v<T, float>) return Dtype::kFloat32;
  return Dtype::kOther;
}

template <class T>
constexpr size_t kind_of() {  // the index in Attr
  if constexpr (std::is_same_v<T, bool>) return 0;
  if constexpr (std::is_same_v<T, int64_t>) return 1;
  if constexpr (std::is_same_v<T, double>) return 2;
  if constexpr (std::is_same_v<T, std::string>) return 3;
  return 4;
}

// An array of the caller, C-contiguous. It is gone when the step is built.
struct TensorView {
  Dtype dtype;
  Sizes shape;
  const void* data;
};

// The same with its type checked.
template <class T>
struct Tensor {
  const T* data;
  Sizes shape;

  int64_t operator[](size_t axis) const { return shape[axis]; }
  int64_t size() const {
    int64_t n = 1;
    for (const int64_t d : shape) n *= d;
    return n;
  }
  std::vector<T> values() const { return {data, data + size()}; }
};

// The accessors throw std::invalid_argument if what they are asked for is missing or of another
// type, and name it.
class StepArgs {
 public:
  std::string op;
  std::vector<int> inputs;  // values of the plan
  std::map<std::string, Attr> attrs;
  std::map<std::string, TensorView> tensors;
  std::vector<Sizes> input_shapes;  // -1 is a size that is known at run time only
  Sizes output_shape;
  int residual = -1;        // the value to add before the clamp, or -1
  Clamp clamp;              // of what the step makes
  std::vector<int> planes;  // of each input, its first plane in the value; empty: all 0

  virtual ~StepArgs() = default;

  bool flag(const char* name) const { return get<bool>(name); }
  double number(const char* name) const { return get<double>(name); }
  float float32(const char* name) const { return static_cast<float>(number(name)); }
  const std::string& text(const char* name) const { return get<std::string>(name); }
  const Sizes& integers(const char* name) const { return get<Sizes>(name); }
  int64_t integer(const char* name) const { return get<int64_t>(name); }
  int32_t int32(const char* name) const { return narrow(name, integer(name)); }
  std::vector<int> int32s(const char* name) const {
    std::vector<int> all;
    for (const int64_t value : integers(name)) all.push_back(narrow(name, value));
    return all;
  }
  std::array<int64_t, 2> pair(const char* name) const {
    const Sizes& values = integers(name);
    require(values.size() == 2, "% needs two integers as the attribute '%'", op, name);
    return {values[0], values[1]};
  }

  bool has(const char* tensor) const { return tensors.count(tensor) > 0; }
  template <class T>
  Tensor<T> tensor(const char* name, size_t axes) const {
    const TensorView& view = tensor(name, dtype_of<T>(), axes);
    return {static_cast<const T*>(view.data), view.shape};
  }

 private:
  virtual const Attr& attr(const char* name, size_t kind) const;
  virtual const TensorView& tensor(const char* name, Dtype dtype, size_t axes) const;

  template <class T>
  const T& get(const char* name) const {
    return *std::get_if<T>(&attr(name, kind_of<T>()));
  }
  int32_t narrow(const char* name, int64_t value) const {
    using Limits = std::numeric_limits<int32_t>;
    require(value >= Limits::min() && value <= Limits::max(),
            "% needs 32-bit integers as the attribute '%'", op, name);
    return static_cast<int32_t>(value);
  }
};

}  // namespace lutra
