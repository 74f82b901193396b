// Which kernels this build has, which of them this machine can run, and which one to take.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace lutra {

uint32_t cpu_features();                       // Feature bits that CPU and system support
std::vector<std::string> cpu_feature_names();  // for people
std::string cpu_model();
bool cpu_is_zen4();  // AMD family 19h with AVX-512: registers of 512 bits take two steps
std::vector<const Kernels*> compiled_kernels();  // slowest first, whether or not they can run here
std::vector<const Kernels*> runnable_kernels();  // slowest first; the last one is the best

// The kernels called `name`; "" or "auto" takes the best. Throws std::invalid_argument that lists
// the runnable names: an instruction set is never downgraded in silence.
const Kernels& find_kernels(const std::string& name);

}  // namespace lutra
