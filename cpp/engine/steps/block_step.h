// Steps that work on each element alone.
#pragma once

#include <algorithm>

#include "engine/core/elementwise.h"

namespace lutra {

// What element-wise steps share: blocks of the output are made in the order of memory, in place or,
// where nobody reads the floats, in scratch, and quantised from there.
class BlockStep : public Step {
 public:
  static constexpr int64_t kBlock = 2048;  // elements, in the nearest cache

  explicit BlockStep(const Kernels& kernels) : kernels_(kernels) {}
  int max_quantized() const override { return kMaxQuantized; }
  bool absorb(const Step& next) override {
    ElementwisePtr function = next.elementwise();
    if (!function) return false;
    after_ = in_order(after_, std::move(function));
    return true;
  }
  std::string method(const Shapes&) const override { return "float32"; }
  size_t workspace(const Shapes&, int threads) const override {
    return static_cast<size_t>(threads) * kBlock * sizeof(float);
  }

 protected:
  template <class F>  // void(int64_t first, int64_t count, float* to)
  void in_blocks(const StepRun& r, const F& make) const {
    const int64_t size = r.out_shape.size();
    // Several blocks make a work item: taking one costs about as much as a block.
    constexpr int64_t kItem = 4 * kBlock;
    constexpr double kPerMicrosecond = 2e3;  // elements, a rough guess for one core
    r.pool.run(static_cast<size_t>((size + kItem - 1) / kItem),
               static_cast<double>(size) / kPerMicrosecond, [&](size_t item, int worker) {
                 const int64_t begin = static_cast<int64_t>(item) * kItem;
                 const int64_t end = std::min(size, begin + kItem);
                 float* const scratch =
                     reinterpret_cast<float*>(r.workspace) + static_cast<int64_t>(worker) * kBlock;
                 for (int64_t first = begin; first < end; first += kBlock) {
                   const int64_t count = std::min(kBlock, end - first);
                   float* const to = r.out ? r.out + first : scratch;
                   make(first, count, to);
                   if (after_) {
                     const Channels at = channels_at(r.out_shape, first);
                     after_->apply(to, static_cast<size_t>(count), at, to);
                   }
                   for (int i = 0; i < r.quantized; ++i) {
                     kernels_.quantize(to, static_cast<size_t>(count), r.q[i].grid,
                                       r.q[i].data + first);
                   }
                 }
               });
  }

  // The channels of what is stored from there on.
  static Channels channels_at(const Shape& s, int64_t first) {
    return s.rank < 2 ? Channels{} : along(s, 1, first);
  }
  // The same of the entries of any axis.
  static Channels along(const Shape& s, int axis, int64_t first) {
    const int64_t step = storage_strides(s)[static_cast<size_t>(axis)], size = s[axis];
    return {first / step % size, first % step, step, size};
  }

  const Kernels& kernels_;

 private:
  ElementwisePtr after_;  // of what it makes; null: none
};

// The step of a function; layers take it over where they can.
StepPtr elementwise_step(const Kernels& kernels, ElementwisePtr function);

}  // namespace lutra
