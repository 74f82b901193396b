#include "engine/training/lookup.h"

#include <algorithm>
#include <vector>

namespace lutra {
namespace {

constexpr int64_t kChunk = 1 << 15;
constexpr double kPerMicrosecond = 2e3;  // elements of one core, a rough guess

}  // namespace

LookupGradient lookup_gradient(const Kernels& kernels, const float* x, const uint8_t* indices,
                               float* gradient, int64_t count, float low, float high,
                               int32_t levels, ThreadPool& pool) {
  const int64_t chunks = (count + kChunk - 1) / kChunk;
  std::vector<LookupGradient> parts(static_cast<size_t>(chunks));
  pool.run(parts.size(), static_cast<double>(count) / kPerMicrosecond, [&](size_t i, int) {
    const int64_t first = static_cast<int64_t>(i) * kChunk;
    LookupGradient& p = parts[i];
    kernels.response_grad(x + first, indices + first, gradient + first,
                          static_cast<size_t>(std::min(kChunk, count - first)), low, high, levels,
                          p.cells.data(), p.counts.data(), &p.inside);
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
