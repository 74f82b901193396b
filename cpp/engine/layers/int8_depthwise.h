// A depthwise convolution in int8: every output comes from one channel.
#pragma once

#include <memory>

#include "engine/layers/depthwise_planes.h"
#include "engine/layers/layer.h"

namespace lutra {

// For is_depthwise(geometry, channels): weight (outputs, 1, kernel_h, kernel_w), scale and bias
// (outputs).
// Throws std::invalid_argument if the sizes do not fit each other.
std::unique_ptr<Layer> make_int8_depthwise(const Kernels& kernels, const ConvGeometry& geometry,
                                           int64_t outputs, const Quantization& quantization,
                                           const int8_t* weight, const float* scale,
                                           const float* bias);

}  // namespace lutra
