// A convolution or linear layer whose products are entries of one table, read at the index of an
// activation and the index of a weight; exact int32 sums.
#include <vector>

#include "engine/core/limits.h"
#include "engine/layers/gathered.h"

namespace lutra {
namespace {

class LookupLayer : public GatheredLayer {
 public:
  // table (2^bits, weights), entries -127..127, zero for activations of zero; weight (outputs,
  // channels, kernel_h, kernel_w): indices 0..weights-1; scale and bias (outputs). Throws
  // std::invalid_argument, saying what is wrong, if they do not fit each other.
  LookupLayer(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs,
              const Quantization& quantization, int64_t weights, const int8_t* table,
              const uint8_t* weight, const float* scale, const float* bias);
  size_t parameter_bytes() const override { return kernels_.response_bytes(shape_); }

 private:
  size_t gathered_bytes() const override { return kernels_.index_bytes(shape_); }
  void gather(const Patch& patch, uint8_t* gathered) const override {
    kernels_.gather_indices(shape_, patch, gathered);
  }
  void multiply(int64_t, const uint8_t* gathered, int64_t first, int64_t last,
                const Epilogue& e) const override {
    kernels_.respond(shape_, packed_.data(), gathered, static_cast<int32_t>(first),
                     static_cast<int32_t>(last), e);
  }
  void multiply_row(const uint8_t* x, int64_t first, int64_t last, int32_t* sums) const override {
    kernels_.respond_row(shape_, packed_.data(), x, static_cast<int32_t>(first),
                         static_cast<int32_t>(last), sums);
  }
  int64_t largest_sum() const override { return 127 * depth(); }

  LookupShape shape_;
  AlignedBytes packed_;
};

LookupLayer::LookupLayer(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs,
                         const Quantization& quantization, int64_t weights, const int8_t* table,
                         const uint8_t* weight, const float* scale, const float* bias)
    : GatheredLayer("lookup", kernels, geometry, outputs, 1, quantization, kMaxLookupActBits, scale,
                    bias) {
  const Quantization& q = quantization;
  const int64_t depth = this->depth(), levels = int64_t{1} << q.bits;
  require(weights >= kMinWeights && weights <= kMaxWeights && weights % 2 == 1,
          "the table must have an odd number of columns, %..%, not %", kMinWeights, kMaxWeights,
          weights);
  require(depth >= 1 && depth <= kMaxLookupDepth, "rows of % entries have no exact 32-bit sums",
          depth);
  for (int64_t i = 0; i < levels * weights; ++i) {
    const std::string place = "table entry (" + std::to_string(i / weights) + ", " +
                              std::to_string(i % weights) + ") is " + std::to_string(table[i]);
    require(table[i] >= -kInt8Max, "%; the range is -127..127", place);
    require(i / weights != q.zero || table[i] == 0,
            "%, but activations of zero have zero responses", place);
  }
  for (int64_t i = 0; i < outputs * depth; ++i) {
    if (weight[i] < weights) continue;
    require(false, "weight index % of output %, entry % is not in 0..%", weight[i], i / depth,
            i % depth, weights - 1);
  }
  shape_ = {.depth = static_cast<int32_t>(depth),
            .taps = static_cast<int32_t>(geometry.taps()),
            .outputs = static_cast<int32_t>(outputs),
            .levels = static_cast<int32_t>(levels),
            .weights = static_cast<int32_t>(weights)};
  packed_ = AlignedBytes(kernels.response_bytes(shape_));
  kernels.pack_responses(shape_, table, weight, packed_.data());
}

// Indices of `bits` bits each, in rows of whole bytes -> one index a byte, (rows, depth).
std::vector<uint8_t> unpacked(const Tensor<uint8_t>& packed, int64_t bits, int64_t depth) {
  std::vector<uint8_t> indices(static_cast<size_t>(packed[0] * depth));
  const int mask = (1 << bits) - 1;
  for (int64_t row = 0; row < packed[0]; ++row) {
    const uint8_t* const from = packed.data + row * packed[1];
    uint8_t* const to = indices.data() + row * depth;
    for (int64_t d = 0; d < depth; ++d) {
      to[d] = static_cast<uint8_t>(from[d * bits / 8] >> d * bits % 8 & mask);
    }
  }
  return indices;
}

std::unique_ptr<Layer> make_lookup(const Kernels& kernels, const StepArgs& args, bool linear) {
  const ConvGeometry geometry = row_geometry(args, linear);
  const Quantization grid = grid_of(args);
  const Tensor<int8_t> table = args.tensor<int8_t>("table", 2);
  const Tensor<uint8_t> weight = args.tensor<uint8_t>("weight", 2);
  const int64_t bits = args.integer("weight_bits"), depth = geometry.depth();
  const auto text = [](const Sizes& s) { return Shape{s[0], s[1]}.text(); };
  require(is_one_of(bits, kWeightBits), "lookup layer: weight bits must be 2, 4 or 8, not %", bits);
  require(depth >= 1 && depth <= kMaxLookupDepth && weight[1] == (depth * bits + 7) / 8,
          "lookup layer: weight indices of the shape % for rows of % entries of % bits",
          text(weight.shape), depth, bits);
  require(grid.bits >= kMinLookupActBits && grid.bits <= kMaxLookupActBits,
          "lookup layer: activation bits must be %..%, not %", kMinLookupActBits, kMaxLookupActBits,
          grid.bits);
  require(table[0] == int64_t{1} << grid.bits,
          "lookup layer: a table of the shape % for activations of % levels", text(table.shape),
          1 << grid.bits);
  std::vector<uint8_t> indices;
  if (bits < 8) indices = unpacked(weight, bits, depth);
  return std::make_unique<LookupLayer>(kernels, geometry, weight[0], grid, table[1], table.data,
                                       bits < 8 ? indices.data() : weight.data,
                                       per_output(args, "scale", weight[0]),
                                       per_output(args, "bias", weight[0]));
}

}  // namespace

void lookup_ops(OpRegistry& r) {
  r.add("lookup_conv2d", layer_operator<make_lookup, false>());
  r.add("lookup_linear", layer_operator<make_lookup, true>());
}

}  // namespace lutra
