#include "engine/core/quantization.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/core/limits.h"

namespace lutra {
namespace {

constexpr int kNeighbours = 8;  // floats looked at on either side of a boundary

float corrected_quotient(float x, float scale, float inverse) {
  const float t = x * inverse;
  return std::fmaf(std::fmaf(-t, scale, x), inverse, t);
}

// The corrected quotient differs from the exact one by less than 2^-45 of its value, so it can
// round to another integer only within a few floats of a boundary k + 1/2.
bool rounds_alike(float scale, float inverse, int32_t low, int32_t high) {
  for (int32_t k = low - 1; k <= high; ++k) {
    const float boundary = (static_cast<float>(k) + 0.5f) * scale;
    float x = boundary;
    for (int i = 0; i < kNeighbours; ++i) x = std::nextafterf(x, -INFINITY);
    for (int i = 0; i <= 2 * kNeighbours; ++i, x = std::nextafterf(x, INFINITY)) {
      const float exact = x / scale;
      if (std::nearbyintf(exact) != std::nearbyintf(corrected_quotient(x, scale, inverse))) {
        return false;
      }
    }
  }
  return true;
}

}  // namespace

Grid make_grid(const Quantization& q) {
  Grid g{.scale = q.scale, .inverse = 0.0f, .zero = q.zero, .qmax = q.qmax()};
  // Far from these limits no intermediate value overflows or loses bits below the normal range.
  if (q.scale > 1e-20f && q.scale < 1e20f) {
    const float inverse = 1.0f / q.scale;
    if (rounds_alike(q.scale, inverse, -q.zero, q.qmax() - q.zero)) g.inverse = inverse;
  }
  return g;
}

bool are_symmetric(const int8_t* weight, int64_t count) {
  return std::all_of(weight, weight + count, [](int8_t w) { return w >= -kInt8Max; });
}

std::vector<int32_t> zero_offsets(const int8_t* weight, int64_t outputs, int64_t depth,
                                  int32_t zero) {
  std::vector<int32_t> offsets;
  for (int64_t m = 0; m < outputs; ++m, weight += depth) {
    offsets.push_back(-zero * std::accumulate(weight, weight + depth, int32_t{0}));
  }
  return offsets;
}

}  // namespace lutra
