// The same with dot products of bytes (relaxed SIMD) in dense int8 layers and in the search for the
// nearest centroid.
#include "wasm_kernels.h"

#ifndef __wasm_relaxed_simd__
#error "wasm_dot.cc needs relaxed SIMD"
#endif

namespace lutra {

constinit const Kernels kWasmDot = kernels("wasm_dot", kFeatureWasm | kFeatureWasmDot);

}  // namespace lutra
