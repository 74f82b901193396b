#include "engine/layers/layer_step.h"

#include "engine/core/elementwise.h"
#include "engine/layers/layer.h"

namespace lutra {

Shape LayerStep::infer(const Shapes& inputs) const {
  const Shape& x = inputs[0];
  Shape y = x;
  if (linear_) {
    require(x.rank >= 2 && x[x.rank - 1] == geometry_.channels,
            "a linear layer of % features got the shape %", geometry_.channels, x);
    y[y.rank - 1] = outputs_;
  } else {
    const ConvGeometry& g = geometry_;
    require(x.rank == 4 && x[1] == g.channels, "a convolution over % channels got the shape %",
            g.channels, x);
    require(g.out_h(x[2]) > 0 && g.out_w(x[3]) > 0, "the kernel is larger than the padded image %",
            x);
    y = Shape{x[0], outputs_, g.out_h(x[2]), g.out_w(x[3])};
  }
  require(!residual_ || inputs[1] == y, "the added tensor's shape differs from the output's");
  return y;
}

bool LayerStep::absorb(const Step& next) {
  ElementwisePtr function = next.elementwise();
  if (!function) return false;
  const int64_t channels = function->channels();
  if (channels > 0 && (!channels_are_outputs_ || channels != outputs_)) return false;
  function_ = in_order(function_, std::move(function));
  return true;
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

namespace {

class QuantizedStep : public LayerStep {
 public:
  QuantizedStep(std::unique_ptr<Layer> layer, bool linear, const StepArgs& args)
      : LayerStep(layer->geometry(), layer->outputs(), linear, args), layer_(std::move(layer)) {}
  void prepare(const Shapes& inputs) const override { layer_->prepare(rows(inputs[0])); }
  size_t workspace(const Shapes& inputs, int threads) const override {
    const auto x = view<const uint8_t>(inputs[0], nullptr);
    return layer_->workspace_bytes(x.n, x.h, x.w, threads, direct(inputs));
  }
  void run(const StepRun& r) const override {
    layer_->run(view(r.shapes[0], r.bytes), output(r), r.workspace, r.pool);
  }
  void set_outputs(const std::vector<Quantization>& grids, bool floats) override {
    const bool can_fold = grids.size() == 1 && !floats && !residual_;
    if (can_fold) fold_ = layer_->fold(clamp_, function_.get(), grids[0]);
  }
  std::string method(const Shapes& inputs) const override {
    return layer_->method(rows(inputs[0]));
  }
  size_t parameter_bytes() const override { return layer_->parameter_bytes(); }

 private:
  std::unique_ptr<Layer> layer_;
};

}  // namespace

int add_layer(PlanBuilder& plan, const StepArgs& args, std::unique_ptr<Layer> layer, bool linear) {
  const int bytes = plan.quantized(args.inputs[0], layer->quantization());
  return plan.add_step(std::make_unique<QuantizedStep>(std::move(layer), linear, args),
                       with_residual(bytes, args));
}

}  // namespace lutra
