// One step of a plan: an operator, or several fused into one.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "shape.h"
#include "thread_pool.h"

namespace lutra {

class Step {
 public:
  virtual ~Step() = default;

  // Shape of the output. Throws std::invalid_argument if the inputs do not fit.
  virtual Shape infer(const std::vector<Shape>& inputs) const = 0;

  // Bytes of scratch memory that run() may use.
  virtual size_t workspace(const std::vector<Shape>& inputs, int threads) const;

  // Inputs and output are in storage order (shape.h). Called from several threads at once, each
  // with its own buffers.
  virtual void run(const std::vector<Shape>& shapes, const std::vector<const float*>& inputs,
                   const Shape& out_shape, float* out, uint8_t* workspace,
                   ThreadPool& pool) const = 0;
};

using StepPtr = std::unique_ptr<Step>;

// Throws std::invalid_argument(what) unless ok.
void require(bool ok, const std::string& what);

}  // namespace lutra
