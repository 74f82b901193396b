// Shared libraries that add operators.
#include "engine/core/op_registry.h"

#ifdef _WIN32
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace lutra {
namespace {

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
    require(handle_ != nullptr, "cannot load operators from '%': %", path, why);
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

void load_ops(const std::string& path) {
  Library library(path);
  auto* const abi = library.function<const char*()>("lutra_engine_abi");
  auto* const fill = library.function<void(OpRegistry&)>("lutra_register_ops");
  require(abi && fill,
          "'%' has no operators: it must define lutra_engine_abi and lutra_register_ops, see "
          "op_registry.h",
          path);
  require(std::string(abi()) == engine_abi(),
          "'%' was built for another engine (%; this one is %); compile it with the headers of "
          "this version of lutra",
          path, abi(), engine_abi());
  OpRegistry filled = op_registry();
  library.keep();  // from here on there may be pointers into it
  fill(filled);
  op_registry() = std::move(filled);
}

}  // namespace lutra
