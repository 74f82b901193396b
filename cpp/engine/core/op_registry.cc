#include "engine/core/op_registry.h"

#include <algorithm>

#include "engine/layers/layer.h"

#ifdef _WIN32
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace lutra {

// The families: each adds its operators.
using Family = void(OpRegistry&);
Family pq_ops, lookup_ops, int8_ops, lowbit_ops, dense_ops, conv_transpose_ops, basic_ops,
    arithmetic_ops, function_ops, norm_ops, group_norm_ops, attention_ops, matmul_ops,
    pointwise_ops, reduce_ops, pool_ops, image_ops, resample_ops, sequence_ops, select_ops,
    recurrent_ops, position_ops, decoder_ops;

namespace {

constexpr Family* kFamilies[] = {
    pq_ops,       lookup_ops,     int8_ops,      lowbit_ops,   dense_ops,      conv_transpose_ops,
    basic_ops,    arithmetic_ops, function_ops,  norm_ops,     group_norm_ops, attention_ops,
    matmul_ops,   pointwise_ops,  reduce_ops,    pool_ops,     image_ops,      resample_ops,
    sequence_ops, select_ops,     recurrent_ops, position_ops, decoder_ops};

// A library that stays loaded, or is unloaded again.
class Library {
 public:
  explicit Library(const std::string& path) {
#ifdef _WIN32
    handle_ = LoadLibraryA(path.c_str());
    const std::string why = "error " + std::to_string(GetLastError());
#else
    handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    const char* const error = handle_ ? nullptr : dlerror();
    const std::string why = error ? error : "";
#endif
    require(handle_ != nullptr, "cannot load operators from '" + path + "': " + why);
  }
  ~Library() {
    if (kept_) return;
#ifdef _WIN32
    FreeLibrary(handle_);
#else
    dlclose(handle_);
#endif
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  template <class F>
  F* function(const char* name) const {
#ifdef _WIN32
    return reinterpret_cast<F*>(GetProcAddress(handle_, name));
#else
    return reinterpret_cast<F*>(dlsym(handle_, name));
#endif
  }
  void keep() { kept_ = true; }

 private:
#ifdef _WIN32
  HMODULE handle_;
#else
  void* handle_;
#endif
  bool kept_ = false;
};

}  // namespace

void OpRegistry::add(const std::string& name, Operator op) {
  const bool added = ops_.emplace(name, std::move(op)).second;
  require(added, "there is an operator '" + name + "' already");
}

std::vector<std::string> OpRegistry::names() const {
  std::vector<std::string> all;
  for (const auto& entry : ops_) all.push_back(entry.first);
  return all;
}

const Operator& OpRegistry::find(const std::string& name) const {
  const auto found = ops_.find(name);
  require(found != ops_.end(), "'" + name + "' is not an operator of the engine");
  return found->second;
}

int OpRegistry::build(PlanBuilder& plan, const StepArgs& args) const {
  const Operator& op = find(args.op);
  const size_t count = args.inputs.size();
  require(count >= op.inputs && count <= std::max(op.inputs, op.most),
          args.op + " does not take " + std::to_string(count) + " inputs");
  require(args.input_shapes.size() == count,
          args.op + " got " + std::to_string(args.input_shapes.size()) + " shapes for " +
              std::to_string(count) + " inputs");
  require(op.fuses || (args.residual < 0 && !args.clamp.on),
          args.op + " neither adds another value nor clamps");
  bool planes = args.planes.empty() || args.planes.size() == count;
  for (const int plane : args.planes) planes = planes && (plane == 0 || op.reads_planes);
  require(planes, args.op + " cannot read these planes of its inputs");
  return op.build(plan, args);
}

std::unique_ptr<Layer> OpRegistry::layer(const Kernels& kernels, const StepArgs& args) const {
  const Operator& op = find(args.op);
  require(static_cast<bool>(op.layer), args.op + " is not a layer that runs on its own");
  return op.layer(kernels, args);
}

OpRegistry& op_registry() {
  static OpRegistry registry = [] {
    OpRegistry filled;
    for (Family* const family : kFamilies) family(filled);
    return filled;
  }();
  return registry;
}

void load_ops(const std::string& path) {
  Library library(path);
  auto* const abi = library.function<const char*()>("lutra_engine_abi");
  auto* const fill = library.function<void(OpRegistry&)>("lutra_register_ops");
  require(abi && fill, "'" + path +
                           "' has no operators: it must define lutra_engine_abi and "
                           "lutra_register_ops, see op_registry.h");
  require(std::string(abi()) == engine_abi(),
          "'" + path + "' was built for another engine (" + abi() + "; this one is " +
              engine_abi() + "); compile it with the headers of this version of lutra");
  OpRegistry filled = op_registry();
  library.keep();  // from here on there may be pointers into it
  fill(filled);
  op_registry() = std::move(filled);
}

}  // namespace lutra
