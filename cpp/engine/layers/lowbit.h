// A matrix of low-bit weights, packed for one kernel of one instruction set.
#pragma once

#include <vector>

#include "engine/core/memory.h"
#include "engine/core/thread_pool.h"
#include "kernels/kernels.h"

namespace lutra {

enum class LowBitKernel { kDense, kTables, kRegisters };
inline constexpr int kLowBitKernels = 3;
const char* lowbit_kernel_name(LowBitKernel kernel);  // "dense", "tables", "registers"

// Throws std::invalid_argument for sizes that are not sound.
void check_lowbit(const LowBitShape& shape);

// A weight of code u stands for the integer level
//   ternary: u - 1        1, 2, 3 and 4 bits: 2 u - (levels - 1)
// and for the number scale * (level - zero) of its group.
class LowBitMatrix {
 public:
  // codes (outputs, depth), each below shape.levels; scale and zero (groups, outputs), zero may be
  // null. Throws std::invalid_argument for sizes and codes that are not sound.
  LowBitMatrix(const Kernels& kernels, LowBitKernel kernel, const LowBitShape& shape,
               const uint8_t* codes, const float* scale, const int32_t* zero);

  const LowBitShape& shape() const { return shape_; }
  int32_t groups() const { return shape_.depth / shape_.group; }
  size_t bytes() const { return bytes_; }  // of packed weights, scales and zero points

  // Bytes of scratch of a call with n rows, 64-byte aligned.
  size_t workspace_bytes(int64_t n, int threads) const;

  // out (n, outputs) = the product of x (n, depth), each row quantised to int8 by its largest
  // magnitude, with the transposed matrix. x is finite.
  void matmul(const float* x, int64_t n, float* out, uint8_t* scratch, ThreadPool& pool) const;

  // out (n, groups, outputs) = the sums of levels times x (n, depth), exact.
  void sums(const int8_t* x, int64_t n, int32_t* out, uint8_t* scratch, ThreadPool& pool) const;

 private:
  struct Scratch;  // where the parts of a call's scratch are
  int32_t tile_width(int64_t rows) const;
  int32_t tile_depth() const;  // entries of a group in a tile of activations
  int32_t call_outputs(int64_t tiles, int threads) const;
  Scratch scratch_of(int64_t n, int threads, uint8_t* memory) const;
  void prepare(const int8_t* x, int64_t n, const Scratch&, int64_t tile) const;
  // done(first row, rows, group, first output, outputs, sums, from one row of sums to the next)
  template <class Done>
  void run(int64_t n, const Scratch&, ThreadPool& pool, const Done& done) const;

  const Kernels* kernels_;
  LowBitKernel kernel_;
  LowBitShape shape_;
  size_t bytes_ = 0;
  AlignedBytes packed_;
  std::vector<float> scale_;
  std::vector<int32_t> zero_;
};

}  // namespace lutra
