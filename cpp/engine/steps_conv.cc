#include "steps_conv.h"

#include <algorithm>

namespace lutra {
namespace {

// Rough speeds of one core, to guess how long a job takes.
constexpr double kCopiedPerMicrosecond = 2e3;
constexpr double kMultipliedPerMicrosecond = 3e4;

// The view of a stored value (N, C, H, W).
ImageView stored_image(const Shape& s, const float* data) {
  return {.data = const_cast<float*>(data),
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
// makes planes of (N, D) and leaves the last of more axes where it is.
ImageView stored_rows(const Shape& s, const float* data) {
  const Dims strides = storage_strides(s);
  const int64_t features = s[s.rank - 1];
  return {.data = const_cast<float*>(data),
          .n = s.size() / features,
          .c = features,
          .h = 1,
          .w = 1,
          .sn = s.rank == 2 ? 1 : features,
          .sc = strides[s.rank - 1],
          .sh = 1,
          .sw = 1};
}

Shape conv_output(const ConvGeometry& g, int64_t outputs, const Shape& x, bool residual,
                  const std::vector<Shape>& inputs) {
  require(x.rank == 4 && x[1] == g.channels, "a convolution over " + std::to_string(g.channels) +
                                                 " channels got the shape " + x.text());
  const Shape y{x[0], outputs, g.out_h(x[2]), g.out_w(x[3])};
  require(x[2] + 2 * g.pad_h >= g.dilation_h * (g.kernel_h - 1) + 1 &&
              x[3] + 2 * g.pad_w >= g.dilation_w * (g.kernel_w - 1) + 1,
          "the kernel is larger than the padded image " + x.text());
  require(!residual || inputs[1] == y, "the added tensor's shape differs from the output's");
  return y;
}

Shape linear_output(int64_t features, int64_t outputs, const Shape& x, bool residual,
                    const std::vector<Shape>& inputs) {
  require(x.rank >= 2 && x[x.rank - 1] == features,
          "a linear layer of " + std::to_string(features) + " features got the shape " + x.text());
  Shape y = x;
  y[y.rank - 1] = outputs;
  require(!residual || inputs[1] == y, "the added tensor's shape differs from the output's");
  return y;
}

}  // namespace

PqConvStep::PqConvStep(PqLayer layer, bool linear, bool residual, Clamp clamp)
    : layer_(std::move(layer)), linear_(linear), residual_(residual), clamp_(clamp) {}

Shape PqConvStep::infer(const std::vector<Shape>& inputs) const {
  const ConvGeometry& g = layer_.geometry();
  return linear_ ? linear_output(g.channels, layer_.shape().outputs, inputs[0], residual_, inputs)
                 : conv_output(g, layer_.shape().outputs, inputs[0], residual_, inputs);
}

size_t PqConvStep::workspace(const std::vector<Shape>& inputs, int threads) const {
  const ImageView x = view(inputs[0], nullptr);
  return layer_.workspace_bytes(x.n, x.h, x.w, threads);
}

ImageView PqConvStep::view(const Shape& shape, const float* data) const {
  return linear_ ? stored_rows(shape, data) : stored_image(shape, data);
}

void PqConvStep::run(const std::vector<Shape>& shapes, const std::vector<const float*>& inputs,
                     const Shape& out_shape, float* out, uint8_t* workspace,
                     ThreadPool& pool) const {
  layer_.run({.input = view(shapes[0], inputs[0]),
              .output = view(out_shape, out),
              .residual = residual_ ? inputs[1] : nullptr,
              .clamp = clamp_},
             workspace, pool);
}

ConvStep::ConvStep(const Kernels& kernels, const ConvGeometry& geometry, int64_t outputs,
                   int64_t groups, const float* weight, const float* bias, bool residual,
                   Clamp clamp)
    : kernels_(kernels),
      geometry_(geometry),
      outputs_(outputs),
      groups_(groups),
      bias_(bias, bias + outputs),
      residual_(residual),
      clamp_(clamp) {
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
        std::max(depth * tile + PaddedPlanes<float>::kSlack, (w + 15) / 16 * 16));
  }
};

Shape ConvStep::infer(const std::vector<Shape>& inputs) const {
  return conv_output(geometry_, outputs_, inputs[0], residual_, inputs);
}

size_t ConvStep::workspace(const std::vector<Shape>& inputs, int threads) const {
  const Shape& x = inputs[0];
  const PaddedPlanes<float> planes(geometry_, x[0], x[2], x[3]);
  const Sizes s(planes, geometry_.depth() / groups_, kernels_.row_tile, x[3]);
  return (s.planes + s.worker * static_cast<size_t>(threads)) * sizeof(float);
}

void ConvStep::run(const std::vector<Shape>& shapes, const std::vector<const float*>& inputs,
                   const Shape& out_shape, float* out, uint8_t* workspace, ThreadPool& pool) const {
  const ImageView x = stored_image(shapes[0], inputs[0]), y = stored_image(out_shape, out);
  const PaddedPlanes<float> planes(geometry_, x.n, x.h, x.w);
  const int64_t depth = geometry_.depth() / groups_, tile = kernels_.row_tile;
  const Sizes s(planes, depth, tile, x.w);
  float* const padded = reinterpret_cast<float*>(workspace);
  float* const workers = padded + s.planes;
  auto copy = [](const float* from, int64_t count, float* to) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  };
  const double fill = static_cast<double>(x.n * x.c * x.h * x.w) / kCopiedPerMicrosecond;
  pool.run(static_cast<size_t>(x.n * x.c), fill, [&](size_t item, int worker) {
    const int64_t n = static_cast<int64_t>(item) / x.c, c = static_cast<int64_t>(item) % x.c;
    planes.fill(padded, x, n, c, c + 1, 0.0f, workers + worker * s.worker, copy);
  });
  const int64_t rows = planes.rows(), per_group = outputs_ / groups_;
  const double work = static_cast<double>(rows * depth) * static_cast<double>(outputs_);
  pool.run(static_cast<size_t>((rows + tile - 1) / tile), work / kMultipliedPerMicrosecond,
           [&](size_t index, int worker) {
             float* const patch = workers + static_cast<size_t>(worker) * s.worker;
             const int64_t first = static_cast<int64_t>(index) * tile,
                           count = std::min(tile, rows - first);
             const auto runs = planes.runs(first, count);
             if (count < tile) std::fill(patch, patch + s.worker, 0.0f);
             for (int64_t group = 0; group < groups_; ++group) {
               planes.gather(padded, runs, group * depth, (group + 1) * depth, tile, patch);
               const int64_t m = group * per_group;
               const Epilogue e{.scale = nullptr,
                                .bias = bias_.data() + m,
                                .residual = residual_ ? inputs[1] + m * y.sc + first : nullptr,
                                .out = out + m * y.sc + first,
                                .residual_stride = static_cast<size_t>(y.sc),
                                .out_stride = static_cast<size_t>(y.sc),
                                .rows = static_cast<int32_t>(count),
                                .clamp = clamp_.on,
                                .low = clamp_.low,
                                .high = clamp_.high};
               kernels_.gemm(patch, static_cast<size_t>(depth),
                             weight_.data() + static_cast<size_t>(group) * group_weights_,
                             static_cast<int32_t>(per_group), e);
             }
           });
}

LinearStep::LinearStep(const Kernels& kernels, int64_t features, int64_t outputs,
                       const float* weight, const float* bias, bool residual, Clamp clamp)
    : kernels_(kernels),
      features_(features),
      outputs_(outputs),
      bias_(bias, bias + outputs),
      residual_(residual),
      clamp_(clamp) {
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

Shape LinearStep::infer(const std::vector<Shape>& inputs) const {
  return linear_output(features_, outputs_, inputs[0], residual_, inputs);
}

size_t LinearStep::workspace(const std::vector<Shape>&, int threads) const {
  return static_cast<size_t>(padded()) * sizeof(float) * static_cast<size_t>(threads);
}

void LinearStep::run(const std::vector<Shape>& shapes, const std::vector<const float*>& inputs,
                     const Shape& out_shape, float* out, uint8_t* workspace,
                     ThreadPool& pool) const {
  const ImageView x = stored_rows(shapes[0], inputs[0]), y = stored_rows(out_shape, out);
  const double work = static_cast<double>(x.n * features_) * static_cast<double>(outputs_);
  pool.run(static_cast<size_t>(x.n), work / kMultipliedPerMicrosecond,
           [&](size_t index, int worker) {
             const int64_t row = static_cast<int64_t>(index);
             float* const sums = reinterpret_cast<float*>(workspace) + worker * padded();
             kernels_.linear(x.data + row * x.sn, static_cast<size_t>(x.sc),
                             static_cast<size_t>(features_), weight_.data(), bias_.data(),
                             static_cast<int32_t>(outputs_), sums);
             for (int64_t m = 0; m < outputs_; ++m) {
               const int64_t at = row * y.sn + m * y.sc;
               out[at] = clamp_(residual_ ? sums[m] + inputs[1][at] : sums[m]);
             }
           });
}

}  // namespace lutra
