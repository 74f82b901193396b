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

std::string text_of(const TensorView& view) {
  return std::string(name_of(view.dtype)) + " with " + axes_text(view.shape.size());
}

}  // namespace

const Attr& StepArgs::attr(const char* name, size_t kind) const {
  const auto found = attrs.find(name);
  if (found == attrs.end()) {
    fail("% needs the attribute '%' (%), and has %", {op, name, kKinds[kind], names(attrs)});
  }
  require(found->second.index() == kind, "% needs the attribute '%' (%), and it is of type %", op,
          name, kKinds[kind], kKinds[found->second.index()]);
  return found->second;
}

const TensorView& StepArgs::tensor(const char* name, Dtype dtype, size_t axes) const {
  const auto found = tensors.find(name);
  const bool there = found != tensors.end();
  if (!there || found->second.dtype != dtype || found->second.shape.size() != axes) {
    fail("% needs the tensor '%' (%, %), and %",
         {op, name, name_of(dtype), axes_text(axes),
          there ? "it is " + text_of(found->second) : "has " + names(tensors)});
  }
  return found->second;
}

}  // namespace lutra
