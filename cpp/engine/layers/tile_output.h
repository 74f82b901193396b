// Where the sums of a layer go: floats, quantised copies for the readers of the value, or both.
#pragma once

#include <algorithm>

#include "engine/core/fold.h"
#include "engine/core/memory.h"
#include "engine/core/quantization.h"
#include "engine/core/step.h"
#include "engine/layers/patches.h"

namespace lutra {

struct LayerOutput {
  const Fold* fold = nullptr;       // see Epilogue; null: none
  ImageView view;                   // data may be null: nobody reads the floats
  const float* residual = nullptr;  // laid out like the view, or null
  Clamp clamp;
  const Elementwise* function = nullptr;  // of what the rest makes; null: none
  int quantized = 0;                      // copies laid out like the view
  struct {
    Grid grid;
    uint8_t* data;
  } q[kMaxQuantized] = {};
};

class TileOutput {
 public:
  TileOutput(const LayerOutput& output, const Kernels& kernels, const int32_t* offset,
             const float* scale, const float* bias);

  // Scratch of a worker. Where the rows of a tile are consecutive in the output, only functions
  // need it, a block of outputs at a time.
  static size_t scratch_bytes(int64_t outputs, int32_t row_tile, bool direct);
  // Whether the rows of every tile are consecutive in the output.
  static bool direct(const ImageView& out) { return out.row_step() == 1; }

  // Makes outputs from..to-1, counted from `base`, of rows first..first+count-1: calls
  // kernel(from, to, epilogue), perhaps several times for parts of the outputs.
  template <class F>
  void make(int64_t first, int64_t count, uint8_t* scratch, int64_t base, int64_t from, int64_t to,
            const F& kernel) const {
    if (!in_blocks()) {
      kernel(from, to, begin(first, count, scratch, base));
      end(first, count, scratch, base + from, to - from);
      return;
    }
    for (int64_t m = from; m < to; m += kBlockOutputs) {
      const int64_t last = std::min(to, m + kBlockOutputs);
      kernel(m, last, begin_block(first, count, scratch, base, m));
      end_block(first, count, scratch, base + m, last - m);
    }
  }
  // The same for `groups` groups of `size` outputs each: kernel(group, from, to, epilogue).
  template <class F>
  void make_groups(int64_t first, int64_t count, uint8_t* scratch, int64_t groups, int64_t size,
                   const F& kernel) const {
    if (!in_blocks() || size >= kBlockOutputs) {
      for (int64_t g = 0; g < groups; ++g) {
        make(first, count, scratch, g * size, 0, size,
             [&](int64_t from, int64_t to, const Epilogue& e) { kernel(g, from, to, e); });
      }
      return;
    }
    const int64_t block = kBlockOutputs / size;  // small groups share a block
    for (int64_t g = 0; g < groups; g += block) {
      const int64_t last = std::min(groups, g + block);
      for (int64_t i = g; i < last; ++i) {
        const int64_t at = (i - g) * size * block_step(count) * int64_t{sizeof(float)};
        kernel(i, 0, size, begin_block(first, count, scratch + at, i * size, 0));
      }
      end_block(first, count, scratch, g * size, (last - g) * size);
    }
  }
  // Whether make() may be replaced by begin() and the kernel.
  bool plain() const { return whole_ && !in_blocks(); }

  // The epilogue of rows first..first+count-1, for outputs counted from `base`.
  Epilogue begin(int64_t first, int64_t count, uint8_t* scratch, int64_t base = 0) const;
  // Writes outputs base..base+outputs-1 to their places if begin() led them into the scratch.
  void end(int64_t first, int64_t count, uint8_t* scratch, int64_t base, int64_t outputs) const;
  // One row of finished sums: sums[m - base] of outputs base..base+outputs-1; scratch holds five
  // bytes for each of them.
  void row(int64_t row, const int32_t* sums, int64_t base, int64_t outputs, uint8_t* scratch) const;

 private:
  // Outputs that stay in the nearest cache between the kernel, the function and their places.
  static constexpr int64_t kBlockOutputs = 16;

  // Between the outputs of a block.
  static int64_t block_step(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock * kRowBlock; }
  bool folded() const { return o_.fold && o_.fold->on(); }
  bool in_blocks() const { return o_.function && whole_ && !folded(); }
  // Of lines of `step` values, one for each output from `output` on.
  Channels channels(int64_t output, int64_t step) const { return {output, 0, step, o_.view.c}; }
  Epilogue begin_block(int64_t first, int64_t count, uint8_t* scratch, int64_t base,
                       int64_t from) const;
  void end_block(int64_t first, int64_t count, uint8_t* scratch, int64_t base,
                 int64_t outputs) const;
  bool consecutive(int64_t first, int64_t count) const;
  int64_t place(int64_t row) const;
  float finish(float y, int64_t at) const;

  const LayerOutput& o_;
  const Kernels& kernels_;
  const int32_t* offset_;
  const float *scale_, *bias_;
  bool whole_, by_image_;
};

}  // namespace lutra
