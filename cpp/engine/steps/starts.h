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
            "sequence % starts at token % and gets % more, but the table has % positions", n,
            start[n], tokens, positions);
  }
}

}  // namespace lutra
