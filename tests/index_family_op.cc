// A plugin: the operator index_linear, whose table has a row for each index of an activation.
//
//   y[n, m] = float32(sum over d of table[x_q[n, d]][m]) * scale[m] + bias[m]
//
// where x_q is the activation on its grid. Compiled by the tests with the headers of the engine
// alone.
#include "engine/core/op_registry.h"

namespace {

using namespace lutra;

class IndexLinearStep : public Step {
 public:
  IndexLinearStep(int64_t features, Tensor<int8_t> table, Tensor<float> scale, Tensor<float> bias)
      : features_(features),
        outputs_(table[1]),
        table_(table.values()),
        scale_(scale.values()),
        bias_(bias.values()) {}

  Shape infer(const Shapes& inputs) const override {
    const Shape& x = inputs[0];
    require(x.rank == 2 && x[1] == features_,
            "index_linear over " + std::to_string(features_) + " features got " + x.text());
    return {x[0], outputs_};
  }
  std::string method(const Shapes&) const override { return "index"; }
  size_t parameter_bytes() const override { return table_.size(); }

  void run(const StepRun& r) const override {
    const int64_t rows = r.shapes[0][0];
    const Dims from = storage_strides(r.shapes[0]), to = storage_strides(r.out_shape);
    const double microseconds = static_cast<double>(rows * features_ * outputs_) / 1e3;
    r.pool.run(static_cast<size_t>(outputs_), microseconds, [&](size_t output, int) {
      const int64_t m = static_cast<int64_t>(output);
      for (int64_t n = 0; n < rows; ++n) {
        int32_t sum = 0;
        for (int64_t d = 0; d < features_; ++d) {
          sum += table_[r.bytes[n * from[0] + d * from[1]] * outputs_ + m];
        }
        const float scaled = static_cast<float>(sum) * scale_[m];
        r.out[n * to[0] + m * to[1]] = scaled + bias_[m];
      }
    });
  }

 private:
  int64_t features_, outputs_;
  std::vector<int8_t> table_;
  std::vector<float> scale_, bias_;
};

int build(PlanBuilder& plan, const StepArgs& args) {
  const Quantization grid{args.float32("act_scale"), args.int32("act_zero"),
                          args.int32("act_bits")};
  const Tensor<int8_t> table = args.tensor<int8_t>("table", 2);
  const Tensor<float> scale = args.tensor<float>("scale", 1), bias = args.tensor<float>("bias", 1);
  require(grid.bits >= 1 && grid.bits <= 7 && grid.zero >= 0 && grid.zero <= grid.qmax() &&
              grid.scale > 0,
          "index_linear: the grid must have 1..7 bits, a zero point on it and a positive scale");
  require(table[0] == grid.qmax() + 1 && scale[0] == table[1] && bias[0] == table[1],
          "index_linear: the table needs a row for each activation index, and scale and bias one "
          "value for each of its columns");
  return plan.add_step(
      std::make_unique<IndexLinearStep>(args.integer("in_features"), table, scale, bias),
      {plan.quantized(args.inputs[0], grid)});
}

}  // namespace

LUTRA_EXPORT const char* lutra_engine_abi() { return engine_abi(); }

LUTRA_EXPORT void lutra_register_ops(OpRegistry& registry) {
  registry.add("index_linear", {.build = build});
}
