// Where the sequences of a run start, for steps that have a table of positions.
#pragma once

#include <cstdint>
#include <string>

#include "engine/core/step.h"

namespace lutra {

// Throws std::invalid_argument unless the rows start[n] .. start[n] + tokens - 1 are in a table of
// `positions` rows, for every sequence n < batch.
inline void check_starts(const int32_t* start, int64_t batch, int64_t tokens, int64_t positions) {
  for (int64_t n = 0; n < batch; ++n) {
    require(start[n] >= 0 && start[n] + tokens <= positions,
            "sequence " + std::to_string(n) + " starts at token " + std::to_string(start[n]) +
                " and gets " + std::to_string(tokens) + " more, but the table has " +
                std::to_string(positions) + " positions");
  }
}

}  // namespace lutra
