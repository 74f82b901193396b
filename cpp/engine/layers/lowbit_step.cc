// Linear layers of low-bit weights. Activations become int8, row by row, and sums are exact.
#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "engine/core/memory.h"
#include "engine/core/op_registry.h"
#include "engine/layers/layer_step.h"
#include "engine/layers/lowbit_choice.h"

namespace lutra {
namespace {

// Rows that are computed at a time: whole tiles of every kernel (of 12 and of 32 rows).
constexpr int64_t kBlockRows = 480;
constexpr double kFinishedPerMicrosecond = 1e3;

// The code of weight k of an output, as files have it: see lutra.ops.lowbit_storage.
class StoredCodes {
 public:
  StoredCodes(const Tensor<uint8_t>& weight, const LowBitShape& shape)
      : shape_(shape), bytes_(weight.values()), row_(static_cast<size_t>(weight[1])) {
    int64_t bits = 0;
    while (int64_t{1} << bits < shape.levels) ++bits;
    const int64_t needed = shape.levels == 3 ? (shape.depth + 4) / 5 : bits * plane();
    require(weight[1] == needed, "lowbit_linear: % bytes for an output; its codes need %",
            weight[1], needed);
  }
  size_t size() const { return bytes_.size(); }

  // (outputs, depth)
  std::vector<uint8_t> codes() const {
    const size_t depth = static_cast<size_t>(shape_.depth);
    std::vector<uint8_t> all(static_cast<size_t>(shape_.outputs) * depth);
    for (size_t m = 0; m < static_cast<size_t>(shape_.outputs); ++m) {
      const uint8_t* const from = bytes_.data() + m * row_;
      uint8_t* const to = all.data() + m * depth;
      if (shape_.levels == 3) {
        unpack_trits(from, depth, to);
      } else {
        unpack_planes(from, depth, to);
      }
    }
    return all;
  }

 private:
  int64_t plane() const { return (int64_t{shape_.depth} + 7) / 8; }

  static void unpack_trits(const uint8_t* from, size_t depth, uint8_t* to) {
    for (size_t k = 0; k < depth;) {
      int byte = *from++;
      for (int j = 0; j < 5 && k < depth; ++j, ++k) {
        to[k] = static_cast<uint8_t>(byte % 3);
        byte /= 3;
      }
    }
  }
  void unpack_planes(const uint8_t* from, size_t depth, uint8_t* to) const {
    for (int bit = 0; 1 << bit < shape_.levels; ++bit, from += plane()) {
      for (size_t k = 0; k < depth; ++k) {
        to[k] = static_cast<uint8_t>(to[k] | (from[k / 8] >> k % 8 & 1) << bit);
      }
    }
  }

  LowBitShape shape_;
  std::vector<uint8_t> bytes_;
  size_t row_;
};

class LowBitStep : public LayerStep {
 public:
  // scale and zero (groups, outputs), zero may be empty; bias (outputs)
  LowBitStep(const Kernels& kernels, const LowBitShape& shape, StoredCodes codes,
             std::vector<float> scale, std::vector<int32_t> zero, std::vector<float> bias,
             const StepArgs& args)
      : LayerStep({.channels = shape.depth}, shape.outputs, true, args),
        kernels_(kernels),
        shape_(shape),
        stored_(std::move(codes)),
        scale_(std::move(scale)),
        zero_(std::move(zero)),
        bias_(std::move(bias)) {}

  // A kernel packs the weights when there are rows for it.
  void prepare(const Shapes& inputs) const override {
    const int64_t n = rows(inputs[0]);
    matrix(std::min(n, kBlockRows));
    if (n > kBlockRows && n % kBlockRows != 0) matrix(n % kBlockRows);
  }
  size_t workspace(const Shapes& inputs, int threads) const override {
    const int64_t n = std::min(rows(inputs[0]), kBlockRows);
    size_t products = matrix(n).workspace_bytes(n, threads);
    const int64_t rest = rows(inputs[0]) % kBlockRows;
    if (rest > 0) products = std::max(products, matrix(rest).workspace_bytes(rest, threads));
    return buffers(n, nullptr).size + products;
  }
  void run(const StepRun& r) const override;
  std::string method(const Shapes& inputs) const override {
    const LowBitKernel kernel = choose_lowbit(kernels_, shape_, rows(inputs[0])).kernel;
    return std::string("low-bit ") + lowbit_kernel_name(kernel);
  }
  size_t parameter_bytes() const override {
    size_t bytes = stored_.size() + bias_.size() * sizeof(float);
    for (const Packed& packed : packed_) bytes += packed.matrix ? packed.matrix->bytes() : 0;
    return bytes;
  }

 private:
  struct Packed {
    std::once_flag once;
    std::unique_ptr<LowBitMatrix> matrix;
  };
  struct Buffers {
    float *x, *y, *residual;  // (rows, depth), (rows, outputs), (rows, outputs)
    uint8_t *bytes, *rest;    // (rows, outputs), and what products need
    size_t size;              // of all but what products need
  };

  const LowBitMatrix& matrix(int64_t n) const {
    const LowBitKernel kernel = choose_lowbit(kernels_, shape_, n).kernel;
    Packed& packed = packed_[static_cast<size_t>(kernel)];
    std::call_once(packed.once, [&] {
      packed.matrix =
          std::make_unique<LowBitMatrix>(kernels_, kernel, shape_, stored_.codes().data(),
                                         scale_.data(), zero_.empty() ? nullptr : zero_.data());
    });
    return *packed.matrix;
  }
  Buffers buffers(int64_t n, uint8_t* memory) const;
  void finish(float* y, const float* residual) const;

  const Kernels& kernels_;
  LowBitShape shape_;
  StoredCodes stored_;
  std::vector<float> scale_;
  std::vector<int32_t> zero_;
  std::vector<float> bias_;
  mutable Packed packed_[kLowBitKernels];
};

LowBitStep::Buffers LowBitStep::buffers(int64_t n, uint8_t* memory) const {
  const size_t in = static_cast<size_t>(n * shape_.depth), out = static_cast<size_t>(n * outputs_);
  Buffers b{};
  const auto take = [&](size_t bytes) {
    uint8_t* const place = memory ? memory + b.size : nullptr;
    b.size += align64(bytes);
    return place;
  };
  b.x = reinterpret_cast<float*>(take(in * sizeof(float)));
  b.y = reinterpret_cast<float*>(take(out * sizeof(float)));
  b.residual = reinterpret_cast<float*>(take(residual_ ? out * sizeof(float) : 0));
  b.bytes = take(out);
  b.rest = take(0);
  return b;
}

// What becomes of a row of products.
void LowBitStep::finish(float* y, const float* residual) const {
  const size_t outputs = static_cast<size_t>(outputs_);
  for (size_t m = 0; m < outputs; ++m) y[m] += bias_[m];
  for (size_t m = 0; residual && m < outputs; ++m) y[m] += residual[m];
  for (size_t m = 0; clamp_.on && m < outputs; ++m) {  // NaN and -0 become `low`
    const float v = y[m] > clamp_.low ? y[m] : clamp_.low;
    y[m] = v < clamp_.high ? v : clamp_.high;
  }
  if (function_) function_->apply(y, outputs, {0, 0, 1, outputs_}, y);
}

void LowBitStep::run(const StepRun& r) const {
  const auto x = view(r.shapes[0], r.inputs[0]);
  const auto y = view(r.out_shape, r.out);
  const Buffers b = buffers(std::min(x.n, kBlockRows), r.workspace);
  const size_t outputs = static_cast<size_t>(outputs_);
  for (int64_t first = 0; first < x.n; first += kBlockRows) {
    const int64_t n = std::min(kBlockRows, x.n - first);
    const Shape made{n, outputs_};
    const Dims rows{outputs_, 1}, places{y.sn, y.sc};
    const float* in = x.data + first * x.sn;
    if (x.sc != 1 || (n > 1 && x.sn != x.c)) {
      copy_strided(Shape{n, x.c}, in, {x.sn, x.sc}, b.x, {x.c, 1});
      in = b.x;
    }
    matrix(n).matmul(in, n, b.y, b.rest, r.pool);
    if (residual_) copy_strided(made, r.inputs[1] + first * y.sn, places, b.residual, rows);
    const double work = static_cast<double>(n * outputs_) / kFinishedPerMicrosecond;
    r.pool.run(static_cast<size_t>(n), work, [&](size_t row, int) {
      finish(b.y + row * outputs, residual_ ? b.residual + row * outputs : nullptr);
    });
    if (r.out) copy_strided(made, b.y, rows, r.out + first * y.sn, places);
    for (int i = 0; i < r.quantized; ++i) {
      kernels_.quantize(b.y, static_cast<size_t>(n) * outputs, r.q[i].grid, b.bytes);
      copy_strided(made, b.bytes, rows, r.q[i].data + first * y.sn, places);
    }
  }
}

int add_lowbit(PlanBuilder& plan, const StepArgs& args) {
  const Tensor<uint8_t> weight = args.tensor<uint8_t>("weight", 2);
  const Tensor<float> scale = args.tensor<float>("scale", 2);
  const int64_t outputs = weight[0], groups = scale[1];
  const LowBitShape shape{.depth = args.int32("in_features"),
                          .outputs = static_cast<int32_t>(outputs),
                          .levels = args.int32("levels"),
                          .group = args.int32("group")};
  check_lowbit(shape);
  require(scale[0] == outputs && groups == shape.depth / shape.group,
          "lowbit_linear: the scales do not fit the weights");
  // (outputs, groups) -> (groups, outputs)
  const auto by_group = [&](const auto* from, auto to) {
    for (int64_t m = 0; m < outputs; ++m) {
      for (int64_t g = 0; g < groups; ++g) {
        to[static_cast<size_t>(g * outputs + m)] = from[m * groups + g];
      }
    }
    return to;
  };
  std::vector<int32_t> zero;
  if (args.has("zero")) {
    const Tensor<int8_t> given = args.tensor<int8_t>("zero", 2);
    require(given.shape == scale.shape, "lowbit_linear: zero has another shape than scale");
    zero = by_group(given.data, std::vector<int32_t>(static_cast<size_t>(given.size())));
  }
  const float* const bias = per_output(args, "bias", outputs);
  return plan.add_step(
      std::make_unique<LowBitStep>(plan.kernels(), shape, StoredCodes(weight, shape),
                                   by_group(scale.data, scale.values()), std::move(zero),
                                   std::vector<float>(bias, bias + outputs), args),
      with_residual(args.inputs[0], args));
}

}  // namespace

void lowbit_ops(OpRegistry& r) { r.add("lowbit_linear", {.build = add_lowbit, .fuses = true}); }

}  // namespace lutra
