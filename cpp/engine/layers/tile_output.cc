#include "engine/layers/tile_output.h"

#include <cstring>

namespace lutra {
namespace {

// The rows of a tile to the planes of some outputs. Whole tiles are copied with a constant size,
// which becomes a few instructions.
template <class T>
void copy_rows(T* to, int64_t step, const T* from, int64_t from_step, int64_t outputs,
               int64_t rows) {
  if (rows == kMaxRowTile) {
    for (int64_t m = 0; m < outputs; ++m) {
      std::memcpy(to + m * step, from + m * from_step, kMaxRowTile * sizeof(T));
    }
  } else {
    for (int64_t m = 0; m < outputs; ++m) {
      std::memcpy(to + m * step, from + m * from_step, static_cast<size_t>(rows) * sizeof(T));
    }
  }
}

}  // namespace

TileOutput::TileOutput(const LayerOutput& output, const Kernels& kernels, const int32_t* offset,
                       const float* scale, const float* bias)
    : o_(output), kernels_(kernels), offset_(offset), scale_(scale), bias_(bias) {
  const ImageView& v = output.view;
  whole_ = direct(v);
  by_image_ = v.sw == 1 && v.sh == v.w && output.quantized == 0 && !output.function;
}

size_t TileOutput::scratch_bytes(int64_t outputs, int32_t row_tile, bool direct) {
  return align64(static_cast<size_t>(direct ? kBlockOutputs : outputs) *
                 static_cast<size_t>(row_tile) * (sizeof(float) + 1));
}

bool TileOutput::consecutive(int64_t first, int64_t count) const {
  const int64_t pixels = o_.view.h * o_.view.w;
  return whole_ || (by_image_ && first / pixels == (first + count - 1) / pixels);
}

int64_t TileOutput::place(int64_t row) const {
  const ImageView& v = o_.view;
  if (whole_) return row;
  return row / (v.h * v.w) * v.sn + row / v.w % v.h * v.sh + row % v.w * v.sw;
}

Epilogue TileOutput::begin(int64_t first, int64_t count, uint8_t* scratch, int64_t base) const {
  const ImageView& v = o_.view;
  Epilogue e{.offset = offset_ ? offset_ + base : nullptr,
             .scale = scale_ ? scale_ + base : nullptr,
             .bias = bias_ + base,
             .rows = static_cast<int32_t>(count)};
  if (!consecutive(first, count)) {  // end() does the rest
    e.out = reinterpret_cast<float*>(scratch) + base * kernels_.row_tile;
    e.out_stride = static_cast<size_t>(kernels_.row_tile);
    return e;
  }
  const int64_t at = place(first) + base * v.sc;
  e.residual = o_.residual ? o_.residual + at : nullptr;
  e.out = v.data ? v.data + at : nullptr;
  e.residual_stride = e.out_stride = static_cast<size_t>(v.sc);
  e.clamp = o_.clamp.on;
  e.low = o_.clamp.low;
  e.high = o_.clamp.high;
  if (folded()) {
    e.fold_scale = o_.fold->scale.data() + base;
    e.fold_bias = o_.fold->bias.data() + base;
  }
  e.quantized = o_.quantized;
  for (int i = 0; i < o_.quantized; ++i) {
    e.q[i].grid = o_.q[i].grid;
    e.q[i].out = o_.q[i].data + at;
    e.q[i].stride = static_cast<size_t>(v.sc);
  }
  return e;
}

// The kernel adds and clamps; its floats go to the scratch, output after output.
Epilogue TileOutput::begin_block(int64_t first, int64_t count, uint8_t* scratch, int64_t base,
                                 int64_t from) const {
  const int64_t at = place(first) + base * o_.view.sc;
  return {.offset = offset_ ? offset_ + base : nullptr,
          .scale = scale_ ? scale_ + base : nullptr,
          .bias = bias_ + base,
          .residual = o_.residual ? o_.residual + at : nullptr,
          .out = reinterpret_cast<float*>(scratch) - from * block_step(count),
          .residual_stride = static_cast<size_t>(o_.view.sc),
          .out_stride = static_cast<size_t>(block_step(count)),
          .rows = static_cast<int32_t>(count),
          .clamp = o_.clamp.on,
          .low = o_.clamp.low,
          .high = o_.clamp.high};
}

void TileOutput::end_block(int64_t first, int64_t count, uint8_t* scratch, int64_t base,
                           int64_t outputs) const {
  const int64_t from = block_step(count), step = o_.view.sc;
  float* const y = reinterpret_cast<float*>(scratch);
  uint8_t* const bytes = scratch + kBlockOutputs * from * static_cast<int64_t>(sizeof(float));
  // One line, or, where there are gaps between the outputs, one of each.
  const int64_t lines = count == from ? 1 : outputs;
  const size_t length = static_cast<size_t>(count == from ? outputs * count : count);
  const int64_t at = place(first) + base * step;
  for (int64_t i = 0; i < lines; ++i) {
    float* const line = y + i * from;
    o_.function->apply(line, length, channels(base + i, count), line);
  }
  if (o_.view.data) copy_rows(o_.view.data + at, step, y, from, outputs, count);
  for (int q = 0; q < o_.quantized; ++q) {
    for (int64_t i = 0; i < lines; ++i) {
      kernels_.quantize(y + i * from, length, o_.q[q].grid, bytes + i * from);
    }
    copy_rows(o_.q[q].data + at, step, bytes, from, outputs, count);
  }
}

// What the kernels' epilogue does after the bias: NaN and -0 become `low`.
float TileOutput::finish(float y, int64_t at) const {
  if (o_.residual) y += o_.residual[at];
  if (o_.clamp.on) {
    y = y > o_.clamp.low ? y : o_.clamp.low;
    y = y < o_.clamp.high ? y : o_.clamp.high;
  }
  return y;
}

void TileOutput::end(int64_t first, int64_t count, uint8_t* scratch, int64_t base,
                     int64_t outputs) const {
  if (consecutive(first, count)) return;
  const ImageView& v = o_.view;
  const int64_t tile = kernels_.row_tile;
  float* const floats = reinterpret_cast<float*>(scratch) + base * tile;
  constexpr int64_t kBlock = 16;  // outputs at a time, so that their lines stay in the cache
  if (o_.function) {
    for (int64_t m = 0; m < outputs; ++m) {
      float* const y = floats + m * tile;
      for (int64_t r = 0; r < count; ++r) y[r] = finish(y[r], place(first + r) + (base + m) * v.sc);
      o_.function->apply(y, static_cast<size_t>(count), channels(base + m, count), y);
    }
  }
  for (int64_t block = 0; block < outputs; block += kBlock) {
    const int64_t some = std::min(outputs, block + kBlock) - block;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = place(first + r) + (base + block) * v.sc;
      float* const from = floats + block * tile + r;
      for (int64_t m = 0; m < some; ++m) {
        const float y = o_.function ? from[m * tile] : finish(from[m * tile], at + m * v.sc);
        if (v.data) v.data[at + m * v.sc] = y;
        from[m * tile] = y;
      }
    }
  }
  uint8_t* const bytes = scratch + v.c * tile * static_cast<int64_t>(sizeof(float)) + base * tile;
  for (int i = 0; i < o_.quantized; ++i) {
    for (int64_t m = 0; m < outputs; ++m) {
      kernels_.quantize(floats + m * tile, static_cast<size_t>(count), o_.q[i].grid,
                        bytes + m * tile);
    }
    for (int64_t r = 0; r < count; ++r) {
      uint8_t* const to = o_.q[i].data + place(first + r) + base * v.sc;
      for (int64_t m = 0; m < outputs; ++m) to[m * v.sc] = bytes[m * tile + r];
    }
  }
}

void TileOutput::row(int64_t row, const int32_t* sums, int64_t base, int64_t outputs,
                     uint8_t* scratch) const {
  const ImageView& v = o_.view;
  const int64_t start = place(row) + base * v.sc;
  float* const y = reinterpret_cast<float*>(scratch);
  for (int64_t m = 0; m < outputs; ++m) {
    const int32_t sum = offset_ ? sums[m] + offset_[base + m] : sums[m];
    y[m] = static_cast<float>(sum) * scale_[base + m];
    y[m] = y[m] + bias_[base + m];
  }
  if (o_.residual || o_.clamp.on) {
    for (int64_t m = 0; m < outputs; ++m) y[m] = finish(y[m], start + m * v.sc);
  }
  if (o_.function) o_.function->apply(y, static_cast<size_t>(outputs), channels(base, 1), y);
  if (v.data) {
    for (int64_t m = 0; m < outputs; ++m) v.data[start + m * v.sc] = y[m];
  }
  uint8_t* const bytes = scratch + static_cast<size_t>(outputs) * sizeof(float);
  for (int i = 0; i < o_.quantized; ++i) {
    kernels_.quantize(y, static_cast<size_t>(outputs), o_.q[i].grid, bytes);
    uint8_t* const to = o_.q[i].data + start;
    for (int64_t m = 0; m < outputs; ++m) to[m * v.sc] = bytes[m];
  }
}

}  // namespace lutra
