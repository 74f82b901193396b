// One step of a plan: an operator, or several fused into one. A plugin's step needs the headers
// only: everything that it may call is inline or virtual.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/core/cache.h"
#include "engine/core/quantization.h"
#include "engine/core/require.h"
#include "engine/core/shape.h"
#include "engine/core/thread_pool.h"

namespace lutra {

// The channels (axis 1) of values that lie one behind the other: value i is of the channel
// (first + (offset + i) / step) % count.
struct Channels {
  int64_t first = 0, offset = 0, step = 1, count = 1;
};

// What a chain of functions makes of x where no limit holds: scale * x + shift, about.
struct Line {
  double scale = 1.0, shift = 0.0;
  double offset = 0.0;  // the largest shift so far, in units of x
  int functions = 0;    // that round
};

// A function of one variable, or one for each channel, of many values at once.
class Elementwise {
 public:
  virtual ~Elementwise() = default;
  // y[i] = f(x[i]) for i < n; y may be x. The result depends on x[i] and its channel alone.
  virtual void apply(const float* x, size_t n, const Channels& channels, float* y) const = 0;
  // How many channels have a function of their own; 0: all channels have the same.
  virtual int64_t channels() const { return 0; }
  // Whether the function of a channel only scales, shifts and limits: it never falls or never
  // rises. Then `line`, what is before it, becomes what is behind it.
  virtual bool extend(int64_t /*channel*/, Line& /*line*/) const { return false; }
};
using ElementwisePtr = std::shared_ptr<const Elementwise>;

class Step;
using StepPtr = std::unique_ptr<Step>;
using Shapes = std::vector<Shape>;

// Inputs and outputs of one run of a step, all in storage order (shape.h). An input of integers is
// int32 in the place of the floats: integers_of() below.
struct StepRun {
  const Shapes& shapes;                     // of the inputs
  const std::vector<const float*>& inputs;  // null where an input is quantised
  const uint8_t* bytes;                     // the first input, if that is quantised
  const Shape& out_shape;
  float* out;     // null: nobody reads the floats
  int quantized;  // quantised outputs
  struct {
    Grid grid;
    uint8_t* data;
  } q[kMaxQuantized];
  uint8_t* workspace;
  ThreadPool& pool;
  Past* past = nullptr;  // what the step remembers; null: the run is alone
  int64_t first = 0;     // the sequence of the past that is the first sample
};

class Step {
 public:
  virtual ~Step() = default;

  // Shape of the output. Throws std::invalid_argument if the inputs do not fit.
  virtual Shape infer(const Shapes& inputs) const = 0;

  // Whether it reads an input as int32, not as float32.
  virtual bool reads_integers(size_t) const { return false; }

  // Bytes of scratch memory that run() may use.
  virtual size_t workspace(const Shapes&, int) const { return 0; }

  // Called before the first run with inputs of these shapes, from any thread: what is only packed
  // where it is needed is packed here.
  virtual void prepare(const Shapes&) const {}

  // Called from several threads at once, each with its own buffers.
  virtual void run(const StepRun& r) const = 0;

  // Quantised outputs that it can write beside the floats, or instead of them.
  virtual int max_quantized() const { return 0; }

  // Told once, before the first run: the grids of its quantised outputs, and whether it makes
  // floats.
  virtual void set_outputs(const std::vector<Quantization>&, bool) {}

  // The same operation on quantised values, if quantising before it gives the same integers as
  // quantising after it; else null.
  virtual StepPtr on_bytes() const { return nullptr; }

  // What it keeps of each sequence for runs with a cache.
  virtual PastShape remembers() const { return {}; }

  // What it does, if that is a function of each value of its only input; else null.
  virtual ElementwisePtr elementwise() const { return nullptr; }
  // Takes over the step that alone reads its output, before the first run; false if it cannot.
  virtual bool absorb(const Step&) { return false; }

  // Which kernel does the work, for profiles.
  virtual std::string method(const Shapes& inputs) const = 0;
  virtual size_t parameter_bytes() const { return 0; }
};

// A step from floats to floats.
class FloatStep : public Step {
 public:
  void run(const StepRun& r) const final {
    run(r.shapes, r.inputs, r.out_shape, r.out, r.workspace, r.pool);
  }
  std::string method(const Shapes&) const override { return "float32"; }

 protected:
  virtual void run(const Shapes& shapes, const std::vector<const float*>& inputs,
                   const Shape& out_shape, float* out, uint8_t* workspace,
                   ThreadPool& pool) const = 0;
};

// The int32 values of an input for which reads_integers() holds.
inline const int32_t* integers_of(const float* input) {
  return reinterpret_cast<const int32_t*>(input);
}

}  // namespace lutra
