// Transposed convolutions in float32.
#include <algorithm>
#include <vector>

#include "engine/core/elementwise.h"
#include "engine/core/memory.h"
#include "engine/core/op_registry.h"
#include "engine/layers/layer_step.h"

namespace lutra {
namespace {

constexpr double kMultipliedPerMicrosecond = 3e4;  // a rough guess for one core

// Of one axis: kernel entry k of input i belongs to the output i stride - padding + k dilation. The
// outputs o with the same phase (o + padding) mod stride read the same kernel entries, and their
// inputs follow each other: output q stride + r reads, of each of these entries, input q + shift.
struct Phase {
  std::vector<int64_t> entries, shifts;
};

std::vector<Phase> phases_of(int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  std::vector<Phase> phases(static_cast<size_t>(stride));
  for (int64_t r = 0; r < stride; ++r) {
    Phase& phase = phases[static_cast<size_t>(r)];
    for (int64_t k = 0; k < kernel; ++k) {
      const int64_t from = r + padding - k * dilation;
      if (from % stride != 0) continue;
      phase.entries.push_back(k);
      phase.shifts.push_back(from / stride);
    }
  }
  return phases;
}

// x (N, C, H, W) -> (N, M, H', W'), H' = (H - 1) stride - 2 padding + dilation (kernel - 1) + 1 +
// output_padding. Every output is an fma chain over the channels of its group and, in each of them,
// over the kernel entries, ascending; then bias, residual and clamp as in Epilogue.
//
// The stride_h stride_w phases are ordinary convolutions of stride 1 with a part of the kernel.
class ConvTransposeStep : public Step {
 public:
  // weight (outputs, geometry.channels / groups, kernel_h, kernel_w), bias (outputs)
  ConvTransposeStep(const Kernels& kernels, const ConvGeometry& geometry, Pair output_padding,
                    int64_t outputs, int64_t groups, const float* weight, const float* bias,
                    const StepArgs& args)
      : kernels_(kernels),
        g_(geometry),
        output_padding_(output_padding),
        outputs_(outputs),
        groups_(groups),
        bias_(bias, bias + outputs),
        residual_(args.residual >= 0),
        clamp_(args.clamp),
        down_(phases_of(g_.kernel_h, g_.stride_h, g_.pad_h, g_.dilation_h)),
        across_(phases_of(g_.kernel_w, g_.stride_w, g_.pad_w, g_.dilation_w)) {
    require(groups >= 1 && g_.channels % groups == 0 && outputs % groups == 0,
            "groups must divide the channels and the outputs of a transposed convolution");
    require(g_.pad_h == g_.end_h && g_.pad_w == g_.end_w,
            "the padding of a transposed convolution is that of both ends");
    for (const Phase& rows : down_) {
      for (const Phase& columns : across_) {
        start_.push_back(static_cast<int64_t>(weight_.size()));
        if (rows.entries.empty() || columns.entries.empty()) continue;
        for (int64_t group = 0; group < groups; ++group) pack(rows, columns, group, weight);
      }
    }
  }

  Shape infer(const Shapes& in) const override {
    const Shape& x = in[0];
    require(x.rank == 4 && x[1] == g_.channels, "a transposed convolution of % channels got %",
            g_.channels, x);
    const Shape y{
        x[0], outputs_,
        made(x[2], g_.kernel_h, g_.stride_h, g_.pad_h, g_.dilation_h, output_padding_[0]),
        made(x[3], g_.kernel_w, g_.stride_w, g_.pad_w, g_.dilation_w, output_padding_[1])};
    require(y[2] > 0 && y[3] > 0, "the padding of a transposed convolution leaves nothing of %", x);
    require(!residual_ || in[1] == y, "a transposed convolution that makes % cannot add %", y,
            (residual_ ? in[1].text() : std::string()));
    return y;
  }
  bool absorb(const Step& next) override {
    ElementwisePtr function = next.elementwise();
    if (!function || (function->channels() > 0 && function->channels() != outputs_)) return false;
    function_ = in_order(function_, std::move(function));
    return true;
  }
  std::string method(const Shapes&) const override { return "float32"; }
  size_t parameter_bytes() const override {
    return (weight_.size() + bias_.size()) * sizeof(float);
  }
  size_t workspace(const Shapes&, int threads) const override {
    return static_cast<size_t>(threads) * worker_bytes();
  }

  void run(const StepRun& r) const override {
    const Shape &x = r.shapes[0], &y = r.out_shape;
    const int64_t tile = kernels_.row_tile;
    // Outputs of one phase, those that only some phases have included.
    const int64_t high = (y[2] + g_.stride_h - 1) / g_.stride_h;
    const int64_t wide = (y[3] + g_.stride_w - 1) / g_.stride_w;
    const int64_t rows = x[0] * high * wide;
    const double work = static_cast<double>(x[0] * x[2] * x[3]) *
                        static_cast<double>(g_.depth() / groups_ * outputs_);
    r.pool.run(static_cast<size_t>((rows + tile - 1) / tile), work / kMultipliedPerMicrosecond,
               [&](size_t item, int worker) {
                 float* const patch = reinterpret_cast<float*>(
                     r.workspace + static_cast<size_t>(worker) * worker_bytes());
                 const int64_t first = static_cast<int64_t>(item) * tile;
                 const Tile t{first, std::min(tile, rows - first), high, wide};
                 for (int64_t i = 0; i < g_.stride_h; ++i) {
                   for (int64_t j = 0; j < g_.stride_w; ++j) one_phase(r, t, i, j, patch);
                 }
               });
  }

 private:
  struct Tile {
    int64_t first, count, high, wide;
  };

  static int64_t made(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                      int64_t extra) {
    return (size - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1 + extra;
  }
  int64_t group_channels() const { return g_.channels / groups_; }
  int64_t group_outputs() const { return outputs_ / groups_; }
  int64_t patch_floats() const {
    return group_channels() * g_.taps() * kernels_.row_tile +
           static_cast<int64_t>(kSlack / sizeof(float));
  }
  size_t worker_bytes() const {
    return align64(static_cast<size_t>(patch_floats() + group_outputs() * kernels_.row_tile) *
                   sizeof(float));
  }
  size_t packed_floats(const Phase& rows, const Phase& columns) const {
    const int64_t depth =
        group_channels() * static_cast<int64_t>(rows.entries.size() * columns.entries.size());
    const int64_t blocks = (group_outputs() + kGemmOutputs - 1) / kGemmOutputs;
    return static_cast<size_t>(blocks * depth * kGemmOutputs);
  }

  void pack(const Phase& rows, const Phase& columns, int64_t group, const float* weight) {
    const size_t begin = weight_.size();
    weight_.resize(begin + packed_floats(rows, columns), 0.0f);
    float* const packed = weight_.data() + begin;
    const int64_t taps = static_cast<int64_t>(rows.entries.size() * columns.entries.size());
    const int64_t depth = group_channels() * taps;
    for (int64_t m = 0; m < group_outputs(); ++m) {
      float* const block = packed + m / kGemmOutputs * depth * kGemmOutputs + m % kGemmOutputs;
      const float* from = weight + (group * group_outputs() + m) * group_channels() * g_.taps();
      int64_t d = 0;
      for (int64_t c = 0; c < group_channels(); ++c, from += g_.taps()) {
        for (const int64_t ky : rows.entries) {
          for (const int64_t kx : columns.entries) {
            block[d++ * kGemmOutputs] = from[ky * g_.kernel_w + kx];
          }
        }
      }
    }
  }

  void one_phase(const StepRun& r, const Tile& t, int64_t i, int64_t j, float* patch) const {
    const size_t index = static_cast<size_t>(i * g_.stride_w + j);
    const Phase &rows = down_[static_cast<size_t>(i)], &columns = across_[static_cast<size_t>(j)];
    const int64_t tile = kernels_.row_tile;
    const int64_t depth =
        group_channels() * static_cast<int64_t>(rows.entries.size() * columns.entries.size());
    float* const sums = patch + patch_floats();
    const float* weights = weight_.data() + start_[index];
    for (int64_t group = 0; group < groups_; ++group) {
      const int64_t m = group * group_outputs();
      if (depth > 0) {
        gather(r, t, rows, columns, group * group_channels(), patch);
        kernels_.gemm(patch, static_cast<size_t>(depth), weights,
                      static_cast<int32_t>(group_outputs()),
                      {.bias = bias_.data() + m,
                       .out = sums,
                       .out_stride = static_cast<size_t>(tile),
                       .rows = static_cast<int32_t>(t.count)});
        weights += packed_floats(rows, columns);
      } else {
        for (int64_t o = 0; o < group_outputs(); ++o) {
          std::fill_n(sums + o * tile, t.count, bias_[static_cast<size_t>(m + o)]);
        }
      }
      for (int64_t o = 0; o < group_outputs(); ++o) {
        write(r, t, i, j, m + o, sums + o * tile);
      }
    }
  }

  // Calls f(row of the tile, image, line, column, count) for each part of a line of a phase.
  template <class F>
  static void over_lines(const Tile& t, const F& f) {
    for (int64_t row = 0; row < t.count;) {
      const int64_t at = t.first + row, line = at / t.wide, column = at % t.wide;
      const int64_t count = std::min(t.count - row, t.wide - column);
      f(row, line / t.high, line % t.high, column, count);
      row += count;
    }
  }

  // The inputs of a tile, zero outside of the image: (channels of the group, entries, row_tile).
  void gather(const StepRun& r, const Tile& t, const Phase& rows, const Phase& columns,
              int64_t first_channel, float* patch) const {
    const Shape& x = r.shapes[0];
    const int64_t tile = kernels_.row_tile, image = x[2] * x[3];
    float* to = patch;
    for (int64_t c = 0; c < group_channels(); ++c) {
      const float* const plane = r.inputs[0] + (first_channel + c) * x[0] * image;
      for (const int64_t down : rows.shifts) {
        for (const int64_t across : columns.shifts) {
          over_lines(t, [&](int64_t row, int64_t n, int64_t line, int64_t column, int64_t count) {
            float* const y = to + row;
            const int64_t iy = line + down;
            if (iy < 0 || iy >= x[2]) return std::fill_n(y, count, 0.0f), void();
            const float* const from = plane + n * image + iy * x[3];
            const int64_t ix = column + across;
            const int64_t before = std::clamp<int64_t>(-ix, 0, count);
            const int64_t end = std::clamp<int64_t>(x[3] - ix, before, count);
            std::fill(y, y + before, 0.0f);
            std::copy(from + ix + before, from + ix + end, y + before);
            std::fill(y + end, y + count, 0.0f);
          });
          std::fill(to + t.count, to + tile, 0.0f);  // lanes of no row
          to += tile;
        }
      }
    }
  }

  void write(const StepRun& r, const Tile& t, int64_t i, int64_t j, int64_t m, float* sums) const {
    const Shape& y = r.out_shape;
    over_lines(t, [&](int64_t row, int64_t n, int64_t line, int64_t column, int64_t count) {
      const int64_t oy = line * g_.stride_h + i;
      if (oy >= y[2]) return;
      // The last columns may be missing in this phase.
      count = std::min(count, (y[3] - j + g_.stride_w - 1) / g_.stride_w - column);
      const int64_t at = ((m * y[0] + n) * y[2] + oy) * y[3] + column * g_.stride_w + j;
      float* const part = sums + row;
      for (int64_t k = 0; k < count; ++k) {
        float v = part[k];
        if (residual_) v += r.inputs[1][at + k * g_.stride_w];
        if (clamp_.on) {  // as the kernels do: NaN and -0 become `low`
          v = v > clamp_.low ? v : clamp_.low;
          v = v < clamp_.high ? v : clamp_.high;
        }
        part[k] = v;
      }
      if (function_ && count > 0) {
        const size_t n = static_cast<size_t>(count);
        function_->apply(part, n, {m, 0, count, outputs_}, part);
      }
      for (int64_t k = 0; k < count; ++k) r.out[at + k * g_.stride_w] = part[k];
    });
  }

  const Kernels& kernels_;
  ConvGeometry g_;
  Pair output_padding_;
  int64_t outputs_, groups_;
  std::vector<float> weight_, bias_;  // weight: packed, phase after phase, group after group
  std::vector<int64_t> start_;        // of each phase
  bool residual_;
  Clamp clamp_;
  ElementwisePtr function_;  // of what the rest makes; null: none
  std::vector<Phase> down_, across_;
};

int add_conv_transpose(PlanBuilder& plan, const StepArgs& args) {
  const Tensor<float> weight = args.tensor<float>("weight", 4);
  const int64_t groups = args.integer("groups");
  return plan.add_step(
      std::make_unique<ConvTransposeStep>(
          plan.kernels(), conv_geometry(args, weight[1] * groups, {weight[2], weight[3]}),
          args.pair("output_padding"), weight[0], groups, weight.data,
          per_output(args, "bias", weight[0]), args),
      with_residual(args.inputs[0], args));
}

}  // namespace

void conv_transpose_ops(OpRegistry& r) {
  r.add("conv_transpose2d", {.build = add_conv_transpose, .fuses = true});
}

}  // namespace lutra
