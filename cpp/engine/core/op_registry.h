// The operators of the engine by name, and what plugins add to them.
//
// A plugin is a shared library that includes this header and links nothing:
//
//   LUTRA_EXPORT const char* lutra_engine_abi() { return lutra::engine_abi(); }
//   LUTRA_EXPORT void lutra_register_ops(lutra::OpRegistry& r) { r.add("name", {.build = build}); }
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/core/step.h"
#include "engine/core/step_args.h"

#ifdef _WIN32
#define LUTRA_EXPORT extern "C" __declspec(dllexport)
#else
#define LUTRA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace lutra {

class Layer;

// The plan that a builder adds its steps to.
class PlanBuilder {
 public:
  virtual const Kernels& kernels() const = 0;
  // The number of the step's output. A step whose first input is quantised() gets its bytes.
  virtual int add_step(StepPtr step, std::vector<int> inputs) = 0;
  // Whether a value is an input of int32.
  virtual bool is_integer_input(int value) const = 0;
  // The value on a grid, for steps that read integers.
  virtual int quantized(int value, const Quantization& grid) = 0;

 protected:
  ~PlanBuilder() = default;
};

// Adds the steps of an operator and returns the number of its output.
using Builder = int(PlanBuilder&, const StepArgs&);

// The builder of an operator that is one step of its inputs.
template <class S, class... A>
int add_step(PlanBuilder& plan, const StepArgs& args, A&&... a) {
  return plan.add_step(std::make_unique<S>(std::forward<A>(a)...), args.inputs);
}

inline constexpr size_t kAnyInputs = SIZE_MAX;

struct Operator {
  Builder* build;
  size_t inputs = 1;          // how many it takes,
  size_t most = 0;            // and at most; 0: as many as `inputs`
  bool fuses = false;         // takes a value to add, and a clamp
  bool reads_planes = false;  // takes first planes of its inputs
  // The layer on its own; null: there is none.
  std::unique_ptr<Layer> (*layer)(const Kernels&, const StepArgs&) = nullptr;
};

class OpRegistry {
 public:
  virtual ~OpRegistry() = default;
  // Throws std::invalid_argument if there is an operator of that name.
  virtual void add(const char* name, const Operator& op);

  std::vector<std::string> names() const;
  // Throws std::invalid_argument with the name of what is missing or does not fit.
  int build(PlanBuilder& plan, const StepArgs& args) const;
  std::unique_ptr<Layer> layer(const Kernels& kernels, const StepArgs& args) const;

 private:
  const Operator& find(const std::string& name) const;

  std::map<std::string, Operator> ops_;
};

// All operators: those of the engine, and those of the plugins that were loaded.
OpRegistry& op_registry();
// Loads a plugin (plugins.cc). Throws std::invalid_argument with the path if it is none, or was
// built for another engine.
void load_ops(const std::string& path);

// What a plugin and the engine must agree on. Of internal linkage: each of them has its own.
static inline const char* engine_abi() {
  static const std::string abi = [] {
    std::string text = "lutra engine 3, sizes";
    for (const size_t size :
         {sizeof(Step), sizeof(StepRun), sizeof(StepArgs), sizeof(Operator), sizeof(OpRegistry),
          sizeof(ThreadPool), sizeof(Shape), sizeof(Kernels), sizeof(Grid), sizeof(std::string)}) {
      text.append(" ").append(std::to_string(size));
    }
    return text;
  }();
  return abi.c_str();
}

}  // namespace lutra
