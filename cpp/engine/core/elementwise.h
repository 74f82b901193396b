// Functions of each value alone, one behind the other, and those that most networks have.
#pragma once

#include <vector>

#include "engine/core/quantization.h"
#include "engine/core/step.h"

namespace lutra {

// The first function, or null, and then the next one.
ElementwisePtr in_order(ElementwisePtr first, ElementwisePtr next);

// y = min(max(x, low), high), where max gives `low` for NaN
ElementwisePtr limits(float low, float high);
// y = x * scale + bias, a multiply and then an add: of one number each, or one for each channel
ElementwisePtr affine(std::vector<float> scale, std::vector<float> bias);

}  // namespace lutra
