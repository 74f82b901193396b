// The same with dot products of bytes (udot, sdot: optional from Armv8.2 on) in dense and depthwise
// int8 layers and in the search for the nearest centroid.
#include "neon_kernels.h"

#ifndef __ARM_FEATURE_DOTPROD
#error "neon_dot.cc needs dot products"
#endif

namespace lutra {

constinit const Kernels kNeonDot = kernels("neon_dot", kFeatureNeon | kFeatureDot);

}  // namespace lutra
