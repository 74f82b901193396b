// A compiled model: what lutra.runtime.compiled wrote, bound to kernels. The file is trusted in
// nothing.
#pragma once

#include <string>
#include <vector>

#include "engine/core/plan.h"

namespace lutra {

struct ModelValue {
  std::string name;
  bool integers = false;
  Sizes shape;  // -1: any size
};

struct CompiledModel {
  // Throws std::invalid_argument, saying what is wrong with the content. The data are not needed
  // afterwards.
  CompiledModel(const uint8_t* data, size_t size, const Kernels& kernels, int threads);

  std::string metadata;
  std::vector<ModelValue> inputs, outputs;
  Plan plan;
};

}  // namespace lutra
