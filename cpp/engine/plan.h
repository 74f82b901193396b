// A plan: the steps of a graph, their weights packed for one instruction set, ready to run.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "pq_layer.h"
#include "step.h"

namespace lutra {

class Plan {
 public:
  Plan(const Kernels& kernels, int threads) : kernels_(kernels), pool_(threads) {}

  // Building. A value is a number: inputs first, then one per step. Throws std::invalid_argument.
  int add_input();
  int add_step(StepPtr step, std::vector<int> inputs);
  void set_outputs(std::vector<int> outputs);

  const Kernels& kernels() const { return kernels_; }
  int threads() const { return pool_.threads(); }
  int input_count() const { return inputs_; }

  // Everything one run needs and nothing shared: shapes, and one block of memory for all values
  // and scratch. Kept between runs, so that a run with known shapes allocates nothing.
  class Context {
   public:
    const Shape& output_shape(size_t i) const { return shapes_[outputs_[i]]; }
    size_t outputs() const { return outputs_.size(); }
    size_t arena_bytes() const { return arena_bytes_; }

   private:
    friend class Plan;
    std::vector<Shape> input_shapes_, shapes_;
    std::vector<size_t> offsets_;
    std::vector<int> outputs_;
    size_t arena_bytes_ = 0, workspace_ = 0;
    AlignedBytes memory_;
    std::vector<Shape> step_shapes_;
    std::vector<const float*> step_inputs_;
  };

  // Takes a context for these input shapes (logical, batch included) from the free ones or makes
  // one; give it back after execute(). Both may be called from any thread.
  std::unique_ptr<Context> acquire(const std::vector<Shape>& input_shapes);
  void release(std::unique_ptr<Context> context);

  // inputs and outputs are C-contiguous arrays in logical order.
  void execute(Context& context, const std::vector<const float*>& inputs,
               const std::vector<float*>& outputs);

 private:
  struct Entry {
    StepPtr step;
    std::vector<int> inputs;
  };
  void prepare(Context& context, const std::vector<Shape>& input_shapes) const;
  float* value(Context& context, int id) const;

  const Kernels& kernels_;
  ThreadPool pool_;
  int inputs_ = 0;
  std::vector<Entry> steps_;
  std::vector<int> outputs_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Context>> free_;
};

}  // namespace lutra
