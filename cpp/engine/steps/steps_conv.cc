#include "engine/steps/steps_conv.h"

#include <algorithm>

namespace lutra {
namespace {

// Rough speeds of one core, to guess how long a job takes.
constexpr double kCopiedPerMicrosecond = 2e3;
constexpr double kMultipliedPerMicrosecond = 3e4;

// The view of a stored value (N, C, H, W).
template <class T>
View<T> stored_image(const Shape& s, T* data) {
  return {.data = data,
          .n = s[0],
          .c = s[1],
          .h = s[2],
          .w = s[3],
          .sn = s.inner(),
          .sc = s[0] * s.inner(),
          .sh = s[3],
          .sw = 1};
}

// The view of a stored value (N, ..., D) as rows of D: images of one pixel. Channel-first order
// makes planes of (N, D) and (N, T, D), and leaves the last of more axes where it is.
template <class T>
View<T> stored_rows(const Shape& s, T* data) {
  const Dims strides = storage_strides(s);
  const int64_t features = s[s.rank - 1];
  return {.data = data,
          .n = s.size() / features,
          .c = features,
          .h = 1,
          .w = 1,
          .sn = plane_axis(s.rank) == s.rank - 1 ? 1 : features,
          .sc = strides[s.rank - 1],
          .sh = 1,
          .sw = 1};
}

}  // namespace

template <class T>
View<T> LayerStep::view(const Shape& shape, T* data) const {
  return linear_ ? stored_rows(shape, data) : stored_image(shape, data);
}

Shape LayerStep::infer(const Shapes& inputs) const {
  const Shape& x = inputs[0];
  Shape y = x;
  if (linear_) {
    require(x.rank >= 2 && x[x.rank - 1] == geometry_.channels,
            "a linear layer of " + std::to_string(geometry_.channels) + " features got the shape " +
                x.text());
    y[y.rank - 1] = outputs_;
  } else {
    const ConvGeometry& g = geometry_;
    require(x.rank == 4 && x[1] == g.channels, "a convolution over " + std::to_string(g.channels) +
                                                   " channels got the shape " + x.text());
    require(x[2] + 2 * g.pad_h >= g.dilation_h * (g.kernel_h - 1) + 1 &&
                x[3] + 2 * g.pad_w >= g.dilation_w * (g.kernel_w - 1) + 1,
            "the kernel is larger than the padded image " + x.text());
    y = Shape{x[0], outputs_, g.out_h(x[2]), g.out_w(x[3])};
  }
  require(!residual_ || inputs[1] == y, "the added tensor's shape differs from the output's");
  return y;
}

LayerOutput LayerStep::output(const StepRun& r) const {
  LayerOutput o;
  o.view = view(r.out_shape, r.out);
  o.residual = residual_ ? r.inputs[1] : nullptr;
  o.clamp = clamp_;
  o.function = function_.get();
  o.fold = &fold_;
  o.quantized = r.quantized;
  for (int i = 0; i < r.quantized; ++i) {
    o.q[i].grid = r.q[i].grid;
    o.q[i].data = r.q[i].data;
  }
  return o;
}

int64_t LayerStep::rows(const Shape& x) const {
  return linear_ ? x.size() / geometry_.channels
                 : x[0] * geometry_.out_h(x[2]) * geometry_.out_w(x[3]);
}

template <class Layer>
size_t QuantizedStep<Layer>::workspace(const Shapes& inputs, int threads) const {
  const auto x = view<const uint8_t>(inputs[0], nullptr);
  return layer_.workspace_bytes(x.n, x.h, x.w, threads, direct(inputs));
}

template <class Layer>
void QuantizedStep<Layer>::run(const StepRun& r) const {
  layer_.run(view(r.shapes[0], r.bytes), output(r), r.workspace, r.pool);
}

template <class Layer>
void QuantizedStep<Layer>::set_outputs(const std::vector<Quantization>& grids, bool floats) {
  if (can_fold(grids, floats)) fold_ = layer_.fold(clamp_, grids[0]);
}

template class QuantizedStep<PqLayer>;
template class QuantizedStep<Int8Layer>;
template class QuantizedStep<LookupLayer>;

ConvStep::ConvStep(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs,
                   int64_t groups, const float* weight, const float* bias, bool residual,
                   Clamp clamp)
    : LayerStep(geometry, outputs, false, residual, clamp),
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
  size_t planes, worker;  // floats
  Sizes(const PaddedPlanes<float>& p, int64_t depth, int64_t tile, int64_t w) {
    planes = static_cast<size_t>((p.elements() + 15) / 16 * 16);
    worker = static_cast<size_t>(
        std::max<int64_t>(depth * tile + static_cast<int64_t>(kSlack), (w + 15) / 16 * 16));
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
  const Sizes s(planes, depth, tile, x.w);
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
               if (count < tile) std::fill(patch, patch + s.worker, 0.0f);
               for (int64_t group = 0; group < groups_; ++group) {
                 planes.gather(padded, runs, group * depth, (group + 1) * depth, tile, patch);
                 kernels_.gemm(patch, static_cast<size_t>(depth),
                               weight_.data() + static_cast<size_t>(group) * group_weights_,
                               static_cast<int32_t>(per_group),
                               target.begin(first, count, nullptr, group * per_group));
               }
             });
}

LinearStep::LinearStep(const Kernels& kernels, int64_t features, int64_t outputs,
                       const float* weight, const float* bias, bool residual, Clamp clamp)
    : LayerStep({.channels = features}, outputs, true, residual, clamp),
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

const std::vector<float>& LinearStep::tile_weight() const {
  std::call_once(packed_->once, [this] {
    const int64_t blocks = (outputs_ + kGemmOutputs - 1) / kGemmOutputs;
    packed_->weight.reserve(static_cast<size_t>(blocks * features_ * kGemmOutputs));
    for (int64_t first = 0; first < outputs_; first += kGemmOutputs) {
      const float* const block = weight_.data() +
                                 first / kLinearOutputs * features_ * kLinearOutputs +
                                 first % kLinearOutputs;
      for (int64_t d = 0; d < features_; ++d) {
        for (int64_t m = 0; m < kGemmOutputs; ++m) {
          packed_->weight.push_back(block[d * kLinearOutputs + m]);
        }
      }
    }
  });
  return packed_->weight;
}

// What a worker needs: the sums of a row and its bytes, or a patch and the scratch of its outputs.
size_t LinearStep::worker_floats(const Shapes& inputs) const {
  if (by_row(inputs[0])) return static_cast<size_t>(padded() + padded() / 4);
  const int64_t patch = features_ * kernels_.row_tile + static_cast<int64_t>(kSlack);
  return static_cast<size_t>(patch) +
         TileOutput::scratch_bytes(outputs_, kernels_.row_tile, direct(inputs)) / sizeof(float);
}

size_t LinearStep::workspace(const Shapes& inputs, int threads) const {
  if (!by_row(inputs[0])) tile_weight();  // packed when a plan is prepared, not when it runs
  return worker_floats(inputs) * sizeof(float) * static_cast<size_t>(threads);
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
                 if (y.data) y.data[at] = v;
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
               kernels_.gemm(patch, static_cast<size_t>(features_), tile_weight().data(),
                             static_cast<int32_t>(outputs_), target.begin(first, count, scratch));
               target.end(first, count, scratch, 0, outputs_);
             });
}

namespace {

class QuantizeStep : public Step {
 public:
  explicit QuantizeStep(const Kernels& kernels) : kernels_(kernels) {}
  Shape infer(const Shapes& inputs) const override { return inputs[0]; }
  int max_quantized() const override { return 1; }
  std::string method(const Shapes&) const override { return "quantize"; }
  void run(const StepRun& r) const override {
    constexpr int64_t kBlock = 8192;
    const int64_t size = r.shapes[0].size();
    r.pool.run(static_cast<size_t>((size + kBlock - 1) / kBlock),
               static_cast<double>(size) / kCopiedPerMicrosecond, [&](size_t i, int) {
                 const int64_t first = static_cast<int64_t>(i) * kBlock;
                 kernels_.quantize(r.inputs[0] + first,
                                   static_cast<size_t>(std::min(kBlock, size - first)), r.q[0].grid,
                                   r.q[0].data + first);
               });
  }

 private:
  const Kernels& kernels_;
};

}  // namespace

StepPtr quantize_step(const Kernels& kernels) { return std::make_unique<QuantizeStep>(kernels); }

}  // namespace lutra
