// Convolutions in int8 whose kernels read four channels of a pixel at a time.
#pragma once

#include <memory>

#include "engine/layers/layer.h"

namespace lutra {

// Whether the instruction set has them and they pay: there is more than one tap, few of the
// channels and taps that the kernels take together are missing, and outputs are of all channels.
bool is_quad_conv(const Kernels& kernels, const ConvGeometry& geometry, int64_t groups);

// weight (outputs, channels, kernel_h, kernel_w), scale and bias (outputs). Throws
// std::invalid_argument if the sizes do not fit each other.
std::unique_ptr<Layer> make_int8_conv(const Kernels& kernels, const ConvGeometry& geometry,
                                      int64_t outputs, const Quantization& quantization,
                                      const int8_t* weight, const float* scale, const float* bias);

}  // namespace lutra
