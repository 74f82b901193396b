// AArch64's baseline, Advanced SIMD without anything newer: rows in the lanes, tiles of 64 rows as
// blocks of 16. The parts are private headers; neon_kernels.h has the list.
#include "neon_kernels.h"

#ifdef __ARM_FEATURE_DOTPROD
#error "neon.cc is for every CPU: compile it without dot products"
#endif

namespace lutra {

constinit const Kernels kNeon = kernels("neon", kFeatureNeon);

}  // namespace lutra
