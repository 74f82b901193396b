// A plan: the steps of a graph, their weights packed for one instruction set, ready to run.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/core/memory.h"
#include "engine/core/op_registry.h"
#include "engine/core/output_pool.h"

namespace lutra {

// A run would take more memory than it may: see Plan::limit_memory().
class MemoryLimitError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Plan final : public PlanBuilder {
 public:
  Plan(const Kernels& kernels, int threads) : kernels_(kernels), pool_(threads) {}

  // Building. A value is a number. Throws std::invalid_argument. Inputs are float32 or int32; what
  // steps make is float32.
  int add_input(bool integers = false);
  int add_step(StepPtr step, std::vector<int> inputs) override;
  // Who makes it, is decided in the end.
  int quantized(int value, const Quantization& grid) override;
  // What steps added from now on are called in profiles.
  void set_label(std::string label) { label_ = std::move(label); }
  // Ends building: a step takes over the step that alone reads its output, if it can; then it is
  // decided which values are stored as floats, on a grid, or both, and who quantises: the step
  // that makes the value wherever it can.
  void finish(std::vector<int> outputs);

  // Bytes of working memory that one run may take; by default any number. acquire() throws
  // MemoryLimitError before it takes more.
  void limit_memory(size_t bytes) { limit_ = bytes; }

  const Kernels& kernels() const override { return kernels_; }
  int threads() const { return pool_.threads(); }
  int input_count() const { return inputs_; }
  bool is_integer_input(int value) const override {
    return value >= 0 && value < static_cast<int>(values_.size()) &&
           values_[static_cast<size_t>(value)].integers;
  }
  // Shared with the arrays that live in it.
  const std::shared_ptr<OutputPool>& output_pool() const { return output_pool_; }

  // Everything one run needs and nothing shared: shapes, and one block of memory for all values
  // and scratch. A few are kept between runs, so that a run with known shapes allocates nothing.
  class Context {
   public:
    const Shape& output_shape(size_t i) const { return shapes_[outputs_[i]]; }
    size_t outputs() const { return outputs_.size(); }

   private:
    friend class Plan;
    Shapes input_shapes_, shapes_;
    std::vector<size_t> offsets_;
    // Values that live in the caller's arrays: those whose storage order is the arrays' own.
    std::vector<float*> borrowed_;
    std::vector<bool> lent_;
    std::vector<int> outputs_;
    size_t arena_bytes_ = 0, workspace_ = 0;
    AlignedBytes memory_;
    size_t capacity_ = 0;  // of memory_
    Shapes step_shapes_;
    std::vector<const float*> step_inputs_;
    double last_run_ = 1.0;  // seconds
  };

  // Takes a context for these input shapes (logical, batch included) from the free ones or makes
  // one; give it back after execute(). Both may be called from any thread.
  std::unique_ptr<Context> acquire(const Shapes& input_shapes);
  void release(std::unique_ptr<Context> context);
  // Bytes of memory that a context for these shapes takes. Allocates none of them.
  size_t arena_bytes(const Shapes& input_shapes) const;

  // inputs and outputs are C-contiguous arrays in logical order; int32 inputs are given as if they
  // were floats. Throws std::invalid_argument with the label of the step that cannot run. If
  // `seconds` is not null it gets the time of: copying the inputs, each step, copying the outputs.
  // With a cache, sample n continues its sequence `first` + n.
  void execute(Context& context, const std::vector<const float*>& inputs,
               const std::vector<float*>& outputs, double* seconds = nullptr,
               Cache* cache = nullptr, int64_t first = 0);

  // An empty cache for so many sequences.
  std::unique_ptr<Cache> make_cache(int64_t sequences) const;

  // What the steps are, in the order in which they run.
  struct StepInfo {
    std::string label, method;
    size_t bytes;  // of values read and written, and of parameters
  };
  std::vector<StepInfo> describe(const Context& context) const;

 private:
  // A value: floats, or integers on a grid made from the value `source`.
  struct Value {
    int source = -1;
    Quantization grid;
    bool integers = false;  // int32: an input
  };
  struct Entry {
    StepPtr step;
    std::vector<int> inputs;
    int out = -1;                // floats, or -1: nobody reads them
    std::vector<int> quantized;  // outputs on grids
    std::string label;
    int made() const { return out >= 0 ? out : quantized[0]; }  // a value of the output's shape
  };
  bool is_quantized(int value) const { return values_[static_cast<size_t>(value)].source >= 0; }
  void fuse();
  void resolve_quantized();
  Shape infer(const Entry& e, const Shapes& inputs) const;
  void check_memory(size_t bytes) const;
  void lay_out(Context& context, const Shapes& input_shapes) const;
  Shapes input_shapes(const Entry& e, const Context& context) const;
  uint8_t* memory(Context& context, int id) const;
  float* floats(Context& context, int id) const;

  const Kernels& kernels_;
  ThreadPool pool_;
  std::shared_ptr<OutputPool> output_pool_ = std::make_shared<OutputPool>();
  int inputs_ = 0;
  size_t limit_ = SIZE_MAX;
  std::vector<Value> values_;
  std::vector<Grid> grids_;  // of quantised values
  std::vector<Entry> steps_;
  std::vector<int> outputs_;
  std::string label_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Context>> free_;  // the last used at the end
};

}  // namespace lutra
