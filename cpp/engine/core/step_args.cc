#include "engine/core/step_args.h"

namespace lutra {
namespace {

constexpr const char* kKinds[] = {"bool", "int", "float", "str", "tuple of ints"};
constexpr const char* kDtypes[] = {"int8", "uint8", "int32", "float32", "another dtype"};

const char* name_of(Dtype dtype) { return kDtypes[static_cast<size_t>(dtype)]; }

// "'a', 'b'"
template <class Map>
std::string names(const Map& map) {
  std::string list;
  for (const auto& entry : map) list += (list.empty() ? "'" : ", '") + entry.first + "'";
  return list.empty() ? "none" : list;
}

std::string axes_text(size_t axes) {
  return std::to_string(axes) + (axes == 1 ? " axis" : " axes");
}

}  // namespace

const Attr& StepArgs::attr(const std::string& name, size_t kind) const {
  const std::string wanted =
      op + " needs the attribute '" + name + "' (" + kKinds[kind] + "), and ";
  const auto found = attrs.find(name);
  require(found != attrs.end(), wanted + "has " + names(attrs));
  require(found->second.index() == kind, wanted + "it is of type " + kKinds[found->second.index()]);
  return found->second;
}

const TensorView& StepArgs::tensor(const std::string& name, Dtype dtype, size_t axes) const {
  const std::string wanted = op + " needs the tensor '" + name + "' (" + name_of(dtype) + ", " +
                             axes_text(axes) + "), and ";
  const auto found = tensors.find(name);
  require(found != tensors.end(), wanted + "has " + names(tensors));
  const TensorView& view = found->second;
  require(view.dtype == dtype && view.shape.size() == axes,
          wanted + "it is " + name_of(view.dtype) + " with " + axes_text(view.shape.size()));
  return view;
}

}  // namespace lutra
