// WebAssembly with SIMD of 128 bits.
#include "wasm_kernels.h"

#ifdef __wasm_relaxed_simd__
#error "wasm.cc is for every engine with SIMD"
#endif

namespace lutra {

constinit const Kernels kWasm = kernels("wasm", kFeatureWasm);

}  // namespace lutra
