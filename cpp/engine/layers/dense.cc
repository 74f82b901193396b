// Dense convolutions and linear layers in float32.
#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "engine/core/memory.h"
#include "engine/core/op_registry.h"
#include "engine/layers/dense_depthwise.h"
#include "engine/layers/layer_step.h"

namespace lutra {
namespace {

// Rough speeds of one core, to guess how long a job takes.
constexpr double kCopiedPerMicrosecond = 2e3;
constexpr double kMultipliedPerMicrosecond = 3e4;

// Outputs from..to-1 of those that `weight` and `e` are of; `from` begins a block.
void multiply(const Kernels& kernels, const float* patch, int64_t depth, const float* weight,
              int64_t from, int64_t to, Epilogue e) {
  const size_t m = static_cast<size_t>(from);
  e.bias += m;
  if (e.residual) e.residual += m * e.residual_stride;
  if (e.out) e.out += from * static_cast<int64_t>(e.out_stride);
  for (int32_t i = 0; i < e.quantized; ++i) e.q[i].out += m * e.q[i].stride;
  kernels.gemm(patch, static_cast<size_t>(depth), weight + from * depth,
               static_cast<int32_t>(to - from), e);
}

class ConvStep : public LayerStep {
 public:
  // weight (outputs, geometry.channels / groups, kernel_h, kernel_w), bias (outputs)
  ConvStep(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs, int64_t groups,
           const float* weight, const float* bias, const StepArgs& args);
  size_t workspace(const Shapes& inputs, int threads) const override;
  void run(const StepRun& r) const override;
  std::string method(const Shapes&) const override { return "float32"; }
  size_t parameter_bytes() const override { return weight_.size() * sizeof(float); }

 private:
  struct Sizes;
  const Kernels& kernels_;
  int64_t groups_;
  std::vector<float> weight_, bias_;  // weight: packed, group after group
  size_t group_weights_;              // packed floats per group
};

// Few rows are multiplied one by one, many as the tiles of a convolution: the bits are the same.
class LinearStep : public LayerStep {
 public:
  // weight (outputs, features), bias (outputs)
  LinearStep(const Kernels& kernels, int64_t features, int64_t outputs, const float* weight,
             const float* bias, const StepArgs& args);
  void prepare(const Shapes& inputs) const override;
  size_t workspace(const Shapes& inputs, int threads) const override {
    return worker_floats(inputs) * sizeof(float) * static_cast<size_t>(threads);
  }
  void run(const StepRun& r) const override;
  std::string method(const Shapes&) const override { return "float32"; }
  size_t parameter_bytes() const override { return weight_.size() * sizeof(float); }

 private:
  bool by_row(const Shape& x) const { return rows(x) <= kFewRows; }
  size_t worker_floats(const Shapes& inputs) const;
  void run_rows(const StepRun& r) const;
  void run_tiles(const StepRun& r) const;
  int64_t padded() const;

  static constexpr int64_t kFewRows = 8;

  const Kernels& kernels_;
  int64_t features_;
  std::vector<float> weight_, bias_;  // weight: packed for single rows
  mutable std::once_flag packing_;
  mutable std::vector<float> tiles_;  // weight, packed for tiles
};

ConvStep::ConvStep(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs,
                   int64_t groups, const float* weight, const float* bias, const StepArgs& args)
    : LayerStep(geometry, outputs, false, args),
      kernels_(kernels),
      groups_(groups),
      bias_(bias, bias + outputs) {
  require(groups >= 1 && geometry.channels % groups == 0 && outputs % groups == 0,
          "groups must divide the channels and the outputs of a convolution");
  const int64_t depth = geometry.depth() / groups, per_group = outputs / groups;
  const int64_t blocks = (per_group + kGemmOutputs - 1) / kGemmOutputs;
  group_weights_ = static_cast<size_t>(blocks * depth * kGemmOutputs);
  weight_.assign(group_weights_ * static_cast<size_t>(groups), 0.0f);
  for (int64_t m = 0; m < outputs; ++m) {
    const int64_t group = m / per_group, local = m % per_group;
    float* block = weight_.data() + group * static_cast<int64_t>(group_weights_) +
                   local / kGemmOutputs * depth * kGemmOutputs;
    for (int64_t d = 0; d < depth; ++d) {
      block[d * kGemmOutputs + local % kGemmOutputs] = weight[m * depth + d];
    }
  }
}

struct ConvStep::Sizes {
  size_t planes, patch, worker;  // floats
  Sizes(const PaddedPlanes<float>& p, int64_t depth, int32_t tile, int64_t w) {
    planes = static_cast<size_t>((p.elements() + 15) / 16 * 16);
    patch = static_cast<size_t>(
        std::max<int64_t>(depth * tile + static_cast<int64_t>(kSlack), (w + 15) / 16 * 16));
    worker = patch + TileOutput::scratch_bytes(0, tile, true) / sizeof(float);
  }
};

size_t ConvStep::workspace(const Shapes& inputs, int threads) const {
  const Shape& x = inputs[0];
  const PaddedPlanes<float> planes(geometry_, x[0], x[2], x[3]);
  const Sizes s(planes, geometry_.depth() / groups_, kernels_.row_tile, x[3]);
  return (s.planes + s.worker * static_cast<size_t>(threads)) * sizeof(float);
}

void ConvStep::run(const StepRun& r) const {
  const View<const float> x = stored_image(r.shapes[0], r.inputs[0]);
  const PaddedPlanes<float> planes(geometry_, x.n, x.h, x.w);
  const int64_t depth = geometry_.depth() / groups_, tile = kernels_.row_tile;
  const Sizes s(planes, depth, kernels_.row_tile, x.w);
  float* const padded = reinterpret_cast<float*>(r.workspace);
  float* const workers = padded + s.planes;
  const double fill = static_cast<double>(x.n * x.c * x.h * x.w) / kCopiedPerMicrosecond;
  r.pool.run(static_cast<size_t>(x.c), fill, [&](size_t item, int) {
    const int64_t c = static_cast<int64_t>(item);
    planes.clear(padded, c, c + 1, 0.0f);
    for (int64_t n = 0; n < x.n; ++n) planes.copy(padded, x.data + n * x.sn + c * x.sc, n, c);
  });
  const LayerOutput out = output(r);
  const TileOutput target(out, kernels_, nullptr, nullptr, bias_.data());
  const int64_t rows = planes.rows(), per_group = outputs_ / groups_;
  const double work = static_cast<double>(rows * depth) * static_cast<double>(outputs_);
  r.pool.run(static_cast<size_t>((rows + tile - 1) / tile), work / kMultipliedPerMicrosecond,
             [&](size_t index, int worker) {
               float* const patch = workers + static_cast<size_t>(worker) * s.worker;
               const int64_t first = static_cast<int64_t>(index) * tile,
                             count = std::min(tile, rows - first);
               const auto runs = planes.runs(first, count);
               if (count < tile) std::fill(patch, patch + s.patch, 0.0f);
               target.make_groups(
                   first, count, reinterpret_cast<uint8_t*>(patch + s.patch), groups_, per_group,
                   [&](int64_t group, int64_t from, int64_t to, const Epilogue& e) {
                     if (from == 0) {
                       planes.gather(padded, runs, group * depth, (group + 1) * depth, tile, patch);
                     }
                     multiply(kernels_, patch, depth,
                              weight_.data() + static_cast<size_t>(group) * group_weights_, from,
                              to, e);
                   });
             });
}

LinearStep::LinearStep(const Kernels& kernels, int64_t features, int64_t outputs,
                       const float* weight, const float* bias, const StepArgs& args)
    : LayerStep({.channels = features}, outputs, true, args),
      kernels_(kernels),
      features_(features),
      bias_(bias, bias + outputs) {
  weight_.assign(static_cast<size_t>(padded() * features), 0.0f);
  for (int64_t m = 0; m < outputs; ++m) {
    float* block = weight_.data() + m / kLinearOutputs * features * kLinearOutputs;
    for (int64_t d = 0; d < features; ++d) {
      block[d * kLinearOutputs + m % kLinearOutputs] = weight[m * features + d];
    }
  }
}

int64_t LinearStep::padded() const {
  return (outputs_ + kLinearOutputs - 1) / kLinearOutputs * kLinearOutputs;
}

// A step that has only ever seen few rows does not hold its weights twice.
void LinearStep::prepare(const Shapes& inputs) const {
  if (by_row(inputs[0])) return;
  std::call_once(packing_, [this] {
    const int64_t blocks = (outputs_ + kGemmOutputs - 1) / kGemmOutputs;
    tiles_.reserve(static_cast<size_t>(blocks * features_ * kGemmOutputs));
    for (int64_t first = 0; first < outputs_; first += kGemmOutputs) {
      const float* const block = weight_.data() +
                                 first / kLinearOutputs * features_ * kLinearOutputs +
                                 first % kLinearOutputs;
      for (int64_t d = 0; d < features_; ++d) {
        for (int64_t m = 0; m < kGemmOutputs; ++m) {
          tiles_.push_back(block[d * kLinearOutputs + m]);
        }
      }
    }
  });
}

// What a worker needs: the sums of a row and its bytes, or a patch and the scratch of its outputs.
size_t LinearStep::worker_floats(const Shapes& inputs) const {
  if (by_row(inputs[0])) return static_cast<size_t>(padded() + padded() / 4);
  const int64_t patch = features_ * kernels_.row_tile + static_cast<int64_t>(kSlack);
  return static_cast<size_t>(patch) +
         TileOutput::scratch_bytes(outputs_, kernels_.row_tile, direct(inputs)) / sizeof(float);
}

void LinearStep::run(const StepRun& r) const {
  if (by_row(r.shapes[0])) {
    run_rows(r);
  } else {
    run_tiles(r);
  }
}

void LinearStep::run_rows(const StepRun& r) const {
  const auto x = view(r.shapes[0], r.inputs[0]);
  const auto y = view(r.out_shape, r.out);
  const double work = static_cast<double>(x.n * features_) * static_cast<double>(outputs_);
  const size_t stride = worker_floats(r.shapes);
  r.pool.run(static_cast<size_t>(x.n), work / kMultipliedPerMicrosecond,
             [&](size_t index, int worker) {
               const int64_t row = static_cast<int64_t>(index);
               float* const sums =
                   reinterpret_cast<float*>(r.workspace) + static_cast<size_t>(worker) * stride;
               kernels_.linear(x.data + row * x.sn, static_cast<size_t>(x.sc),
                               static_cast<size_t>(features_), weight_.data(), bias_.data(),
                               static_cast<int32_t>(outputs_), sums);
               for (int64_t m = 0; m < outputs_; ++m) {
                 const int64_t at = row * y.sn + m * y.sc;
                 float v = residual_ ? sums[m] + r.inputs[1][at] : sums[m];
                 if (clamp_.on) {  // as the kernels do: NaN and -0 become `low`
                   v = v > clamp_.low ? v : clamp_.low;
                   v = v < clamp_.high ? v : clamp_.high;
                 }
                 sums[m] = v;
               }
               if (function_) {
                 function_->apply(sums, static_cast<size_t>(outputs_), {0, 0, 1, outputs_}, sums);
               }
               for (int64_t m = 0; y.data && m < outputs_; ++m) {
                 y.data[row * y.sn + m * y.sc] = sums[m];
               }
               uint8_t* const bytes = reinterpret_cast<uint8_t*>(sums + padded());
               for (int i = 0; i < r.quantized; ++i) {
                 kernels_.quantize(sums, static_cast<size_t>(outputs_), r.q[i].grid, bytes);
                 uint8_t* const to = r.q[i].data + row * y.sn;
                 for (int64_t m = 0; m < outputs_; ++m) to[m * y.sc] = bytes[m];
               }
             });
}

void LinearStep::run_tiles(const StepRun& r) const {
  const auto x = view(r.shapes[0], r.inputs[0]);
  const int64_t tile = kernels_.row_tile;
  const double work = static_cast<double>(x.n * features_) * static_cast<double>(outputs_);
  const size_t stride = worker_floats(r.shapes);
  const LayerOutput out = output(r);
  const TileOutput target(out, kernels_, nullptr, nullptr, bias_.data());
  r.pool.run(static_cast<size_t>((x.n + tile - 1) / tile), work / kMultipliedPerMicrosecond,
             [&](size_t index, int worker) {
               float* const patch =
                   reinterpret_cast<float*>(r.workspace) + static_cast<size_t>(worker) * stride;
               uint8_t* const scratch = reinterpret_cast<uint8_t*>(patch + features_ * tile +
                                                                   static_cast<int64_t>(kSlack));
               const int64_t first = static_cast<int64_t>(index) * tile;
               const int64_t count = std::min(tile, x.n - first);
               const Shape block{features_, count};
               copy_strided(block, x.data + first * x.sn, {x.sc, x.sn}, patch, {tile, 1});
               for (int64_t d = 0; d < features_; ++d) {  // lanes of no row
                 std::fill(patch + d * tile + count, patch + (d + 1) * tile, 0.0f);
               }
               target.make(first, count, scratch, 0, 0, outputs_,
                           [&](int64_t from, int64_t to, const Epilogue& e) {
                             multiply(kernels_, patch, features_, tiles_.data(), from, to, e);
                           });
             });
}

int add_conv(PlanBuilder& plan, const StepArgs& args) {
  const Tensor<float> weight = args.tensor<float>("weight", 4);
  const int64_t groups = args.integer("groups"), outputs = weight[0];
  const ConvGeometry geometry = conv_geometry(args, weight[1] * groups, {weight[2], weight[3]});
  const float* const bias = per_output(args, "bias", outputs);
  StepPtr step;
  if (is_depthwise(geometry, groups)) {
    step = make_depthwise(plan.kernels(), geometry, outputs, weight.data, bias, args);
  } else {
    step = std::make_unique<ConvStep>(plan.kernels(), geometry, outputs, groups, weight.data, bias,
                                      args);
  }
  return plan.add_step(std::move(step), with_residual(args.inputs[0], args));
}

int add_linear(PlanBuilder& plan, const StepArgs& args) {
  const Tensor<float> weight = args.tensor<float>("weight", 2);
  return plan.add_step(
      std::make_unique<LinearStep>(plan.kernels(), weight[1], weight[0], weight.data,
                                   per_output(args, "bias", weight[0]), args),
      with_residual(args.inputs[0], args));
}

}  // namespace

void dense_ops(OpRegistry& r) {
  r.add("conv2d", {.build = add_conv, .fuses = true});
  r.add("linear", {.build = add_linear, .fuses = true});
}

}  // namespace lutra
