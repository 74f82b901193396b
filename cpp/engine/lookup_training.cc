#include "lookup_training.h"

#include <algorithm>
#include <vector>

namespace lutra {
namespace {

constexpr int64_t kChunk = 1 << 15;
constexpr double kPerMicrosecond = 500;  // elements of one core, a rough guess
constexpr int kLanes = 4;  // neighbours often have the same index: their sums need not wait

void add_chunk(const float* x, const uint8_t* indices, float* gradient, int64_t count, float low,
               float high, LookupGradient& to) {
  double cells[kLanes][256] = {}, inside[kLanes] = {};
  uint32_t counts[kLanes][256] = {};
  auto add = [&](int64_t i, int lane) {
    const uint8_t index = indices[i];
    const float g = gradient[i];
    const bool in = low < x[i] && x[i] < high;
    cells[lane][index] += static_cast<double>(g);
    ++counts[lane][index];
    inside[lane] += in ? static_cast<double>(g) * static_cast<double>(x[i]) : 0.0;
    gradient[i] = in ? g : 0.0f;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  }
  for (; i < count; ++i) add(i, 0);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (size_t k = 0; k < to.cells.size(); ++k) {
      to.cells[k] += cells[lane][k];
      to.counts[k] += counts[lane][k];
    }
    to.inside += inside[lane];
  }
}

}  // namespace

LookupGradient lookup_gradient(const float* x, const uint8_t* indices, float* gradient,
                               int64_t count, float low, float high, ThreadPool& pool) {
  const int64_t chunks = (count + kChunk - 1) / kChunk;
  std::vector<LookupGradient> parts(static_cast<size_t>(chunks));
  pool.run(parts.size(), static_cast<double>(count) / kPerMicrosecond, [&](size_t i, int) {
    const int64_t first = static_cast<int64_t>(i) * kChunk;
    add_chunk(x + first, indices + first, gradient + first, std::min(kChunk, count - first), low,
              high, parts[i]);
  });
  LookupGradient sum;
  for (const LookupGradient& part : parts) {
    for (size_t k = 0; k < sum.cells.size(); ++k) {
      sum.cells[k] += part.cells[k];
      sum.counts[k] += part.counts[k];
    }
    sum.inside += part.inside;
  }
  return sum;
}

}  // namespace lutra
