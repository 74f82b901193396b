// Steps that sequences need: tables read by ids, positions, means under a mask, picked entries.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/core/step.h"

namespace lutra {

// ids int32 (N, ...) -> (N, ..., D). The rows of the table (rows, D) are float32, or int8 with a
// scale for each. run() throws std::invalid_argument for an id outside 0..rows-1.
StepPtr embedding_step(int64_t rows, int64_t features, const float* weight);
StepPtr embedding_step(int64_t rows, int64_t features, const int8_t* weight, const float* scale);

// x (N, T, D) + weight[:T]; weight (length, D)
StepPtr position_embedding_step(int64_t length, int64_t features, const float* weight);

// x (N, T, D), mask int32 (N, T) -> sum(x * mask) / max(sum(mask), 1e-9), (N, D)
StepPtr masked_mean_step();

// The entries `index` of an axis, in this order: numpy.take.
StepPtr gather_step(std::vector<int32_t> index, int axis);

}  // namespace lutra
