#include "engine/layers/lookup.h"

#include <algorithm>

namespace lutra {
namespace {

constexpr int64_t kQuantizedBlock = 1 << 14;      // floats of one work item
constexpr double kQuantizedPerMicrosecond = 4e3;  // floats of one core, a rough guess

}  // namespace

LookupLayer::LookupLayer(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs,
                         const Quantization& quantization, int64_t weights, const int8_t* table,
                         const uint8_t* weight, const float* scale, const float* bias)
    : GatheredLayer("lookup", kernels, geometry, outputs, 1, quantization, 6, scale, bias) {
  const Quantization& q = quantization;
  const int64_t depth = this->depth(), levels = int64_t{1} << q.bits;
  require(outputs >= 1, "it has no outputs");
  require(q.bits >= 2, "activation bits must be 2..6, not " + std::to_string(q.bits));
  require(q.zero == 0 || q.zero == levels / 2, "the zero point must be 0 or " +
                                                   std::to_string(levels / 2) + ", not " +
                                                   std::to_string(q.zero));
  require(weights >= 3 && weights <= 33 && weights % 2 == 1,
          "the table must have an odd number of columns, 3..33, not " + std::to_string(weights));
  require(depth >= 1 && depth <= INT32_MAX / 127,
          "rows of " + std::to_string(depth) + " entries have no exact 32-bit sums");
  for (int64_t i = 0; i < levels * weights; ++i) {
    const std::string place = "table entry (" + std::to_string(i / weights) + ", " +
                              std::to_string(i % weights) + ") is " + std::to_string(table[i]);
    require(table[i] >= -127, place + "; the range is -127..127");
    require(i / weights != q.zero || table[i] == 0,
            place + ", but activations of zero have zero responses");
  }
  for (int64_t i = 0; i < outputs * depth; ++i) {
    if (weight[i] < weights) continue;
    require(false, "weight index " + std::to_string(weight[i]) + " of output " +
                       std::to_string(i / depth) + ", entry " + std::to_string(i % depth) +
                       " is not in 0.." + std::to_string(weights - 1));
  }
  shape_ = {.depth = static_cast<int32_t>(depth),
            .taps = static_cast<int32_t>(geometry.taps()),
            .outputs = static_cast<int32_t>(outputs),
            .levels = static_cast<int32_t>(levels),
            .weights = static_cast<int32_t>(weights)};
  packed_ = AlignedBytes(kernels.response_bytes(shape_));
  kernels.pack_responses(shape_, table, weight, packed_.data());
}

void LookupLayer::quantize(const float* x, int64_t count, uint8_t* indices,
                           ThreadPool& pool) const {
  const Grid grid = make_grid(quantization_);
  pool.run(static_cast<size_t>((count + kQuantizedBlock - 1) / kQuantizedBlock),
           static_cast<double>(count) / kQuantizedPerMicrosecond, [&](size_t i, int) {
             const int64_t first = static_cast<int64_t>(i) * kQuantizedBlock;
             const int64_t n = std::min(kQuantizedBlock, count - first);
             kernels_.quantize(x + first, static_cast<size_t>(n), grid, indices + first);
           });
}

void LookupLayer::gather(const Patch& patch, uint8_t* gathered) const {
  kernels_.gather_indices(shape_, patch, gathered);
}

void LookupLayer::multiply(int64_t, const uint8_t* gathered, int64_t first, int64_t last,
                           const Epilogue& e) const {
  kernels_.respond(shape_, packed_.data(), gathered, static_cast<int32_t>(first),
                   static_cast<int32_t>(last), e);
}

void LookupLayer::multiply_row(const uint8_t* x, int64_t first, int64_t last, int32_t* sums) const {
  kernels_.respond_row(shape_, packed_.data(), x, static_cast<int32_t>(first),
                       static_cast<int32_t>(last), sums);
}

}  // namespace lutra
