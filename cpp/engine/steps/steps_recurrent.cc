// Recurrent layers: LSTM and GRU, one layer in one direction.
#include <algorithm>
#include <memory>
#include <vector>

#include "engine/core/limits.h"
#include "engine/core/memory.h"
#include "engine/core/op_registry.h"

namespace lutra {
namespace {

constexpr double kMultipliedPerMicrosecond = 1e4;  // a rough guess for one core
constexpr int64_t kFewRows = 8;                    // of so few each is multiplied on its own

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Products with a matrix, and a bias. The bits do not depend on the number of rows.
class Matrix {
 public:
  Matrix(int64_t outputs, int64_t depth) : outputs_(outputs), depth_(depth) {}
  virtual ~Matrix() = default;
  int64_t outputs() const { return outputs_; }
  int64_t depth() const { return depth_; }
  // Floats from one row of results to the next.
  int64_t stride() const { return round_up(outputs_, kLinearOutputs); }
  virtual size_t bytes() const = 0;
  // Floats of scratch that multiply() needs.
  virtual int64_t scratch() const = 0;
  // Row r of at most row_tile rows is x[r * row_step + d * depth_step], and its results go to
  // y[r * stride() + m].
  virtual void multiply(const float* x, int64_t row_step, int64_t depth_step, int64_t rows,
                        float* y, float* scratch) const = 0;

 protected:
  const int64_t outputs_, depth_;
};

// y = W x + bias, each output an fma chain over the inputs, then the bias.
class FloatMatrix : public Matrix {
 public:
  // weight (outputs, depth), bias (outputs)
  FloatMatrix(const Kernels& kernels, const Tensor<float>& weight, std::vector<float> bias)
      : Matrix(weight[0], weight[1]),
        kernels_(kernels),
        rows_(pack(weight, kLinearOutputs)),
        tiles_(pack(weight, kGemmOutputs)),
        bias_(std::move(bias)) {}

  size_t bytes() const override {
    return (rows_.size() + tiles_.size() + bias_.size()) * sizeof(float);
  }
  int64_t scratch() const override {
    const int64_t patch = depth_ * kernels_.row_tile + static_cast<int64_t>(kSlack);
    return round_up(patch + outputs_ * kernels_.row_tile, 16);
  }

  void multiply(const float* x, int64_t row_step, int64_t depth_step, int64_t rows, float* y,
                float* scratch) const override {
    if (rows <= kFewRows) {
      for (int64_t r = 0; r < rows; ++r) {
        kernels_.linear(x + r * row_step, static_cast<size_t>(depth_step),
                        static_cast<size_t>(depth_), rows_.data(), bias_.data(),
                        static_cast<int32_t>(outputs_), y + r * stride());
      }
      return;
    }
    const int64_t tile = kernels_.row_tile;
    copy_strided(Shape{depth_, rows}, x, {depth_step, row_step}, scratch, {tile, 1});
    for (int64_t d = 0; rows < tile && d < depth_; ++d) {  // lanes of no row
      std::fill(scratch + d * tile + rows, scratch + (d + 1) * tile, 0.0f);
    }
    float* const planes = scratch + depth_ * tile + static_cast<int64_t>(kSlack);
    kernels_.gemm(scratch, static_cast<size_t>(depth_), tiles_.data(),
                  static_cast<int32_t>(outputs_),
                  {.bias = bias_.data(),
                   .out = planes,
                   .out_stride = static_cast<size_t>(tile),
                   .rows = static_cast<int32_t>(rows)});
    copy_strided(Shape{outputs_, rows}, planes, {tile, 1}, y, {1, stride()});
  }

 private:
  // (ceil(outputs / block), depth, block), zero padded
  static std::vector<float> pack(const Tensor<float>& weight, int64_t block) {
    const int64_t depth = weight[1];
    std::vector<float> packed(static_cast<size_t>(round_up(weight[0], block) * depth), 0.0f);
    for (int64_t m = 0; m < weight[0]; ++m) {
      float* const to = packed.data() + m / block * block * depth + m % block;
      for (int64_t d = 0; d < depth; ++d) to[d * block] = weight.data[m * depth + d];
    }
    return packed;
  }

  const Kernels& kernels_;
  std::vector<float> rows_, tiles_, bias_;  // of the kernels `linear` and `gemm`
};

// y[m] = float32(sum over d of W[m][d] (q[d] - zero)) scale[m] + bias[m], where q is x on the grid:
// exact sums, then a multiply and an add.
class Int8Matrix : public Matrix {
 public:
  Int8Matrix(const Kernels& kernels, const Tensor<int8_t>& weight, const Quantization& grid,
             std::vector<float> scale, std::vector<float> bias)
      : Matrix(weight[0], weight[1]),
        kernels_(kernels),
        grid_(make_grid(grid)),
        packed_(kernels.dense8_bytes(narrow(depth_), narrow(outputs_))),
        offset_(zero_offsets(weight.data, outputs_, depth_, grid.zero)),
        scale_(std::move(scale)),
        bias_(std::move(bias)) {
    require(are_symmetric(weight.data, weight.size()), "a weight is -128; the range is -127..127");
    kernels.pack_dense8(narrow(depth_), narrow(outputs_), weight.data, packed_.data());
  }

  size_t bytes() const override {
    return static_cast<size_t>(outputs_ * depth_) + 3 * scale_.size() * sizeof(float);
  }
  int64_t scratch() const override { return round_up(depth_, 64) * 2 + stride(); }
  void multiply(const float* x, int64_t row_step, int64_t depth_step, int64_t rows, float* y,
                float* scratch) const override {
    uint8_t* const q = reinterpret_cast<uint8_t*>(scratch + round_up(depth_, 64));
    int32_t* const sums = reinterpret_cast<int32_t*>(scratch + 2 * round_up(depth_, 64));
    std::fill(q + depth_, q + round_up(depth_, 64), uint8_t{0});
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < depth_; ++d) scratch[d] = x[r * row_step + d * depth_step];
      kernels_.quantize(scratch, static_cast<size_t>(depth_), grid_, q);
      kernels_.dense8_row(narrow(depth_), narrow(outputs_), packed_.data(), q, 0, narrow(outputs_),
                          sums);
      float* const to = y + r * stride();
      for (int64_t m = 0; m < outputs_; ++m) {
        to[m] = static_cast<float>(sums[m] + offset_[m]) * scale_[m];
        to[m] = to[m] + bias_[m];
      }
    }
  }

 private:
  static int32_t narrow(int64_t n) { return static_cast<int32_t>(n); }

  const Kernels& kernels_;
  Grid grid_;
  AlignedBytes packed_;
  std::vector<int32_t> offset_;
  std::vector<float> scale_, bias_;
};

// x (N, T, C), and states (N, H) before the first step or zeros -> (N, T, H): what all steps have.
// Of every step the part of x is a row of products for all tokens, made first; then each sample
// goes through its steps alone.
class RecurrentStep : public FloatStep {
 public:
  RecurrentStep(const Kernels& kernels, const StepArgs& args, int64_t gates, size_t states,
                int64_t parts)
      : name_(args.op),
        kernels_(kernels),
        input_matrix_(matrix(kernels, args, "ih", "act", gates)),
        state_matrix_(matrix(kernels, args, "hh", "state", gates)),
        from_input_(*input_matrix_),
        from_state_(*state_matrix_),
        hidden_(from_state_.depth()),
        gates_(gates),
        parts_(parts),
        reverse_(args.flag("reverse")) {
    const int64_t wanted = gates * hidden_;
    require(from_state_.outputs() == wanted && from_input_.outputs() == wanted,
            "%: for % hidden values both weights must have % rows", name_, hidden_, wanted);
    require(args.inputs.size() == 1 || args.inputs.size() == 1 + states,
            "% takes an input and % states, or no state", name_, states);
  }

  Shape infer(const Shapes& in) const override {
    const Shape& x = in[0];
    require(x.rank == 3 && x[2] == from_input_.depth(), "% of % features got the shape %", name_,
            from_input_.depth(), x);
    for (size_t i = 1; i < in.size(); ++i) {
      require(in[i].rank == 2 && in[i][0] == x[0] && in[i][1] == hidden_,
              "% of % hidden values got a state % for the input %", name_, hidden_, in[i], x);
    }
    return {x[0], x[1], parts_ * hidden_};
  }
  size_t parameter_bytes() const override { return from_input_.bytes() + from_state_.bytes(); }
  size_t workspace(const Shapes& in, int threads) const override {
    const int64_t tokens = in[0][0] * in[0][1];
    return static_cast<size_t>(shared_floats(tokens) + threads * worker_floats()) * sizeof(float);
  }

 protected:
  // One step of one sample: updates h and c (hidden). `input` and `state` are the products of the
  // input and of h (gates * hidden), which it may overwrite.
  virtual void advance(float* input, float* state, float* h, float* c) const = 0;

  void run(const Shapes& shapes, const std::vector<const float*>& in, const Shape&, float* out,
           uint8_t* workspace, ThreadPool& pool) const override {
    const int64_t batch = shapes[0][0], length = shapes[0][1], tokens = batch * length;
    if (tokens == 0) return;
    const int64_t tile = kernels_.row_tile, width = parts_ * hidden_;
    float* const products = reinterpret_cast<float*>(workspace);
    float* const made = products + tokens * from_input_.stride();
    float* const workers = products + shared_floats(tokens);
    const auto scratch = [&](int worker) { return workers + worker * worker_floats(); };
    const double macs = static_cast<double>(tokens) * static_cast<double>(gates_ * hidden_);
    const auto in_tiles = [&](double work, const auto& f) {
      pool.run(static_cast<size_t>((tokens + tile - 1) / tile), work, [&](size_t item, int worker) {
        const int64_t first = static_cast<int64_t>(item) * tile;
        f(first, std::min(tile, tokens - first), worker);
      });
    };
    in_tiles(macs * static_cast<double>(from_input_.depth()) / kMultipliedPerMicrosecond,
             [&](int64_t first, int64_t count, int worker) {
               from_input_.multiply(in[0] + first, 1, tokens, count,
                                    products + first * from_input_.stride(), scratch(worker));
             });
    const int64_t block =
        std::clamp<int64_t>((batch + pool.threads() - 1) / pool.threads(), 1, tile);
    pool.run(static_cast<size_t>((batch + block - 1) / block),
             macs * static_cast<double>(hidden_) / kMultipliedPerMicrosecond,
             [&](size_t item, int worker) {
               const int64_t first = static_cast<int64_t>(item) * block;
               samples(in, batch, length, first, std::min(block, batch - first), products, made,
                       scratch(worker));
             });
    in_tiles(static_cast<double>(tokens * width) / kMultipliedPerMicrosecond,
             [&](int64_t first, int64_t count, int) {
               copy_strided(Shape{width, count}, made + first * width, {1, width}, out + first,
                            {tokens, 1});
             });
  }

  int64_t hidden() const { return hidden_; }
  void function(Function f, float* x, int64_t count) const {
    kernels_.function(f, x, static_cast<size_t>(count), x);
  }

 private:
  // In int8 where the operator has a grid for what it multiplies.
  static std::unique_ptr<Matrix> matrix(const Kernels& kernels, const StepArgs& args,
                                        const std::string& side, const std::string& grid,
                                        int64_t gates) {
    const Tensor<float> bias = args.tensor<float>(("bias_" + side).c_str(), 1);
    const auto checked = [&](int64_t rows) {
      require(rows == bias[0] && rows % gates == 0,
              "%: weight_% and bias_% must have a row for each gate", args.op, side, side);
    };
    if (args.attrs.count(grid + "_scale") == 0) {
      const Tensor<float> weight = args.tensor<float>(("weight_" + side).c_str(), 2);
      checked(weight[0]);
      return std::make_unique<FloatMatrix>(kernels, weight, bias.values());
    }
    const Tensor<int8_t> weight = args.tensor<int8_t>(("weight_" + side).c_str(), 2);
    const Tensor<float> scale = args.tensor<float>(("scale_" + side).c_str(), 1);
    checked(weight[0]);
    require(scale[0] == bias[0], "%: scale_% must have a row for each gate", args.op, side);
    const Quantization q{args.float32((grid + "_scale").c_str()),
                         args.int32((grid + "_zero").c_str()),
                         args.int32((grid + "_bits").c_str())};
    require(q.bits >= 1 && q.bits <= kMaxActBits && q.zero >= 0 && q.zero <= q.qmax() &&
                q.scale > 0 && weight[1] <= kMaxInt8Depth,
            "%: a grid of % bits with the zero point % for rows of %", args.op, q.bits, q.zero,
            weight[1]);
    return std::make_unique<Int8Matrix>(kernels, weight, q, scale.values(), bias.values());
  }

  int64_t shared_floats(int64_t tokens) const {
    return round_up(tokens * (from_input_.stride() + parts_ * hidden_), 16);
  }
  // Scratch of the products; h and c, and the products of the states, of a tile of samples.
  int64_t worker_floats() const {
    const int64_t states = kernels_.row_tile * (2 * hidden_ + from_state_.stride());
    return std::max(from_input_.scratch(), from_state_.scratch()) + round_up(states, 16);
  }

  void samples(const std::vector<const float*>& in, int64_t batch, int64_t length, int64_t first,
               int64_t count, float* products, float* made, float* memory) const {
    float* const scratch = memory;
    float* const h = memory + std::max(from_input_.scratch(), from_state_.scratch());
    float* const c = h + count * hidden_;
    float* const from_state = c + count * hidden_;
    std::fill(h, from_state, 0.0f);
    for (size_t i = 1; i < in.size(); ++i) {
      copy_strided(Shape{hidden_, count}, in[i] + first, {batch, 1}, i == 1 ? h : c, {1, hidden_});
    }
    for (int64_t step = 0; step < length; ++step) {
      const int64_t t = reverse_ ? length - 1 - step : step;
      from_state_.multiply(h, hidden_, 1, count, from_state, scratch);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t token = (first + k) * length + t;
        advance(products + token * from_input_.stride(), from_state + k * from_state_.stride(),
                h + k * hidden_, c + k * hidden_);
        float* const to = made + token * parts_ * hidden_;
        std::copy_n(h + k * hidden_, hidden_, to);
        if (parts_ > 1) std::copy_n(c + k * hidden_, hidden_, to + hidden_);
      }
    }
  }

  std::string name_;
  const Kernels& kernels_;
  std::unique_ptr<Matrix> input_matrix_, state_matrix_;
  const Matrix &from_input_, &from_state_;
  int64_t hidden_, gates_;
  int64_t parts_;
  bool reverse_;
};

// The gates are i, f, g, o; each is (W_hh h + b_hh) + (W_ih x + b_ih).
//   c = sigmoid(f) c + sigmoid(i) tanh(g);  h = sigmoid(o) tanh(c)
// With `cells` the output is (N, T, 2 H): h and c of every step.
class LstmStep : public RecurrentStep {
 public:
  LstmStep(const Kernels& kernels, const StepArgs& args)
      : RecurrentStep(kernels, args, 4, 2, args.flag("cells") ? 2 : 1) {}

 protected:
  void advance(float* input, float* state, float* h, float* c) const override {
    const int64_t n = hidden();
    for (int64_t i = 0; i < 4 * n; ++i) input[i] = state[i] + input[i];
    function(Function::kSigmoid, input, 2 * n);
    function(Function::kTanh, input + 2 * n, n);
    function(Function::kSigmoid, input + 3 * n, n);
    const float *in = input, *forget = input + n, *cell = input + 2 * n, *out = input + 3 * n;
    for (int64_t i = 0; i < n; ++i) c[i] = forget[i] * c[i] + in[i] * cell[i];
    std::copy_n(c, n, state);
    function(Function::kTanh, state, n);
    for (int64_t i = 0; i < n; ++i) h[i] = out[i] * state[i];
  }
};

// The gates are r, z, n. With s = W_hh h + b_hh and x = W_ih x + b_ih:
//   r = sigmoid(s_r + x_r);  z = sigmoid(s_z + x_z);  n = tanh(x_n + r s_n)
//   h = (1 - z) n + z h
class GruStep : public RecurrentStep {
 public:
  GruStep(const Kernels& kernels, const StepArgs& args) : RecurrentStep(kernels, args, 3, 1, 1) {}

 protected:
  void advance(float* input, float* state, float* h, float*) const override {
    const int64_t n = hidden();
    for (int64_t i = 0; i < 2 * n; ++i) input[i] = state[i] + input[i];
    function(Function::kSigmoid, input, 2 * n);
    const float *reset = input, *update = input + n;
    float* const fresh = input + 2 * n;
    for (int64_t i = 0; i < n; ++i) fresh[i] = fresh[i] + reset[i] * state[2 * n + i];
    function(Function::kTanh, fresh, n);
    for (int64_t i = 0; i < n; ++i) h[i] = (1.0f - update[i]) * fresh[i] + update[i] * h[i];
  }
};

int add_lstm(PlanBuilder& plan, const StepArgs& args) {
  return add_step<LstmStep>(plan, args, plan.kernels(), args);
}

int add_gru(PlanBuilder& plan, const StepArgs& args) {
  return add_step<GruStep>(plan, args, plan.kernels(), args);
}

}  // namespace

void recurrent_ops(OpRegistry& r) {
  for (const char* name : {"lstm", "int8_lstm"}) r.add(name, {.build = add_lstm, .most = 3});
  for (const char* name : {"gru", "int8_gru"}) r.add(name, {.build = add_gru, .most = 2});
}

}  // namespace lutra
