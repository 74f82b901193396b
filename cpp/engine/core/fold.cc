#include "engine/core/fold.h"

#include <algorithm>
#include <cmath>

namespace lutra {
namespace {

constexpr int kNudges = 8;  // steps to the next float tried on either side
// Where a boundary of the grid, and the offset, is below this in units of sums, float32 is exact
// enough for both forms to change their result within one sum of the real boundary.
constexpr double kLargest = 1 << 20;

int32_t rounded(float t, const Grid& g) {
  const float low = static_cast<float>(-g.zero), high = static_cast<float>(g.qmax - g.zero);
  t = t > low ? t : low;
  t = t < high ? t : high;
  return static_cast<int32_t>(std::nearbyintf(t)) + g.zero;
}

// What happens to the sums of one output.
struct Chain {
  float scale, bias;
  Clamp clamp;
  const Elementwise* function;
  int64_t output, outputs;
  const Grid& grid;

  int32_t operator()(int64_t n) const {
    float y = static_cast<float>(n) * scale;
    y = y + bias;
    if (clamp.on) {
      y = y > clamp.low ? y : clamp.low;
      y = y < clamp.high ? y : clamp.high;
    }
    if (function) function->apply(&y, 1, {output, 0, 1, outputs}, &y);
    return rounded(y / grid.scale, grid);
  }

  // Both forms are monotone in n, so they are equal everywhere if they change at the same places.
  bool equals(int64_t limit, double largest, float a, float b) const {
    auto same = [&](int64_t n) {
      n = std::clamp(n, -limit, limit);
      return (*this)(n) == rounded(std::fmaf(static_cast<float>(n), a, b), grid);
    };
    if (!same(-limit) || !same(limit) || !same(0)) return false;
    if (a == 0.0f) return true;
    for (int32_t k = -grid.zero; k < grid.qmax - grid.zero; ++k) {
      const double n = (k + 0.5 - static_cast<double>(b)) / static_cast<double>(a);
      if (std::abs(n) > static_cast<double>(limit) + 2) continue;
      if (!(std::abs(n) < largest)) return false;
      const int64_t near = static_cast<int64_t>(std::floor(n));
      for (int64_t i = near - 1; i <= near + 2; ++i) {
        if (!same(i)) return false;
      }
    }
    return true;
  }
};

}  // namespace

Fold fold_quantization(const std::vector<float>& scale, const std::vector<float>& bias, Clamp clamp,
                       const Elementwise* function, const Grid& grid, int64_t limit) {
  Fold fold;
  bool any = false;
  for (size_t m = 0; m < scale.size(); ++m) {
    const int64_t output = static_cast<int64_t>(m);
    Line line{.scale = scale[m], .shift = bias[m]};
    line.offset = std::abs(line.shift / line.scale);
    if (function && !function->extend(output, line)) return {};
    // Every function rounds once more.
    const double largest = kLargest / (line.functions + 1);
    const Chain chain{
        scale[m], bias[m], clamp, function, output, static_cast<int64_t>(scale.size()), grid};
    const float a = static_cast<float>(line.scale / grid.scale);
    float up = static_cast<float>(line.shift / grid.scale), down = up;
    const bool possible = line.offset < largest;
    bool found = possible && chain.equals(limit, largest, a, up);
    for (int i = 0; i < kNudges && possible && !found; ++i) {
      up = std::nextafterf(up, INFINITY);
      found = chain.equals(limit, largest, a, up);
      if (found) break;
      down = std::nextafterf(down, -INFINITY);
      found = chain.equals(limit, largest, a, down);
      if (found) up = down;
    }
    if (function && !found) return {};  // the kernels know no function
    any = any || found;
    fold.scale.push_back(found ? a : NAN);
    fold.bias.push_back(up);
  }
  if (!any) return {};
  return fold;
}

}  // namespace lutra
