#include "engine/core/quantize_step.h"

#include <algorithm>

namespace lutra {
namespace {

constexpr double kPerMicrosecond = 2e3;  // elements, a rough guess for one core

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
               static_cast<double>(size) / kPerMicrosecond, [&](size_t i, int) {
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
