#include "engine/layers/lowbit.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "engine/core/limits.h"
#include "engine/core/require.h"

namespace lutra {

namespace {

constexpr double kProductsPerMicrosecond = 50e3;
constexpr int32_t kDenseCall = 256;  // outputs whose packed weights stay in the second cache

template <class... A>
void need(bool condition, const char* pattern, const A&... words) {
  if (!condition) fail("low-bit weights: %", {sentence(pattern, {words...})});
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the kernels' sums become sums of levels: times * sum + plus * (sum of the activations).
struct ToLevels {
  int32_t times, plus;
};
ToLevels to_levels(LowBitKernel kernel, int32_t levels) {
  const bool is_centered = kernel == LowBitKernel::kTables;
  if (levels == 3) return {1, is_centered ? 0 : -1};
  return {2, is_centered ? 1 : -(levels - 1)};
}

// Bytes in[i][j] -> out[j][i] of 8 rows and 8 columns, by exchanging quarters of ever smaller
// squares.
void transpose_8x8(const uint64_t (&in)[8], uint8_t* out, size_t stride) {
  uint64_t a[8];
  std::copy(in, in + 8, a);
  const auto exchange = [&a](int i, int j, int shift, uint64_t mask) {
    const uint64_t t = ((a[i] >> shift) ^ a[j]) & mask;
    a[i] ^= t << shift;
    a[j] ^= t;
  };
  for (int i = 0; i < 4; ++i) exchange(i, i + 4, 32, 0x00000000ffffffffull);
  for (int i : {0, 1, 4, 5}) exchange(i, i + 2, 16, 0x0000ffff0000ffffull);
  for (int i : {0, 2, 4, 6}) exchange(i, i + 1, 8, 0x00ff00ff00ff00ffull);
  for (int i = 0; i < 8; ++i) {
    std::memcpy(out + static_cast<size_t>(i) * stride, &a[i], sizeof a[i]);
  }
}

// out (depth, kTableRows) = x (rows, depth) transposed; what is beyond `rows` is 0.
void to_table_tile(const int8_t* x, size_t stride, int32_t rows, int32_t depth, int8_t* out) {
  uint8_t* const to = reinterpret_cast<uint8_t*>(out);
  for (int32_t r = 0; r < kTableRows; r += 8) {
    for (int32_t k = 0; k < depth; k += 8) {
      const int32_t columns = std::min(8, depth - k);
      uint64_t in[8] = {};
      for (int32_t i = 0; i < 8 && r + i < rows; ++i) {
        std::memcpy(&in[i], x + static_cast<size_t>(r + i) * stride + k,
                    static_cast<size_t>(columns));
      }
      uint8_t* const place = to + static_cast<size_t>(k) * kTableRows + r;
      if (columns == 8) {
        transpose_8x8(in, place, kTableRows);
      } else {
        uint8_t square[64];
        transpose_8x8(in, square, 8);
        for (int32_t j = 0; j < columns; ++j)
          std::memcpy(place + j * kTableRows, square + 8 * j, 8);
      }
    }
  }
}

// out (depth / 4, width, 4): four neighbouring entries of a row together; zeros beyond.
void to_dense_tile(const int8_t* x, size_t stride, int32_t rows, int32_t width, int32_t depth,
                   int8_t* out) {
  for (int32_t r = 0; r < rows; ++r) {
    const int8_t* const from = x + static_cast<size_t>(r) * stride;
    int8_t* const to = out + 4 * r;
    int32_t k = 0;
    for (; k + 4 <= depth; k += 4) std::memcpy(to + static_cast<size_t>(k) * width, from + k, 4);
    if (k < depth) {
      std::memcpy(to + static_cast<size_t>(k) * width, from + k, static_cast<size_t>(depth - k));
    }
  }
}

}  // namespace

const char* lowbit_kernel_name(LowBitKernel kernel) {
  switch (kernel) {
    case LowBitKernel::kTables:
      return "tables";
    case LowBitKernel::kRegisters:
      return "registers";
    default:
      return "dense";
  }
}

void check_lowbit(const LowBitShape& s) {
  need(is_one_of(s.levels, kLowBitLevels), "levels must be 2, 3, 4, 8 or 16, not %", s.levels);
  need(s.depth >= 1 && s.depth <= kMaxLowBitDepth, "the depth must be 1..%, not %", kMaxLowBitDepth,
       s.depth);
  need(s.outputs >= 1 && s.outputs <= kMaxLowBitOutputs, "outputs must be 1..%, not %",
       kMaxLowBitOutputs, s.outputs);
  need(s.group >= 1 && s.depth % s.group == 0, "a group of % does not divide the depth %", s.group,
       s.depth);
}

struct LowBitMatrix::Scratch {
  int64_t tiles;
  int32_t rows;         // of a tile
  int32_t outputs;      // of a call of a kernel
  size_t tile_bytes;    // activations of a tile, all groups
  size_t worker_bytes;  // of a worker
  int8_t* x;            // (n, depth): quantised activations of matmul()
  float* row_scale;     // (n)
  int32_t* x_sum;       // (groups, n)
  int8_t* tile;         // (tiles, groups, tile depth, rows of a tile)
  uint8_t* worker;      // sums of a call, then scratch of the kernel
  size_t bytes;
};

LowBitMatrix::LowBitMatrix(const Kernels& kernels, LowBitKernel kernel, const LowBitShape& shape,
                           const uint8_t* codes, const float* scale, const int32_t* zero)
    : kernels_(&kernels), kernel_(kernel), shape_(shape) {
  check_lowbit(shape);
  const LowBitShape& s = shape_;
  const size_t count = static_cast<size_t>(s.outputs) * static_cast<size_t>(s.depth);
  const uint8_t top = *std::max_element(codes, codes + count);
  need(top < s.levels, "the code % is not below %, the levels", top, s.levels);
  const struct {
    size_t (*bytes)(const LowBitShape&);
    void (*pack)(const LowBitShape&, const uint8_t*, uint8_t*);
  } order[kLowBitKernels] = {{kernels.lowbit_dense_bytes, kernels.pack_lowbit_dense},
                             {kernels.lowbit_table_bytes, kernels.pack_lowbit_tables},
                             {kernels.lowbit_register_bytes, kernels.pack_lowbit_registers}};
  const size_t bytes = order[static_cast<int>(kernel)].bytes(s);
  packed_ = AlignedBytes(bytes);
  order[static_cast<int>(kernel)].pack(s, codes, packed_.data());
  const size_t scales = static_cast<size_t>(groups()) * static_cast<size_t>(s.outputs);
  scale_.assign(scale, scale + scales);
  if (zero) zero_.assign(zero, zero + scales);
  bytes_ = bytes + scale_.size() * sizeof(float) + zero_.size() * sizeof(int32_t);
}

// Rows that a tile of so many rows has room for, as the kernel takes them.
int32_t LowBitMatrix::tile_width(int64_t rows) const {
  if (kernel_ == LowBitKernel::kTables) return kTableRows;
  if (kernel_ == LowBitKernel::kRegisters) {
    return static_cast<int32_t>(std::min<int64_t>(rows, kRegisterRows));
  }
  for (const int32_t width : {1, 2, 4, 8}) {
    if (rows <= width) return width;
  }
  return kLowBitRows;
}

int32_t LowBitMatrix::tile_depth() const {
  if (kernel_ == LowBitKernel::kTables) return kernels_->lowbit_table_depth(shape_);
  return static_cast<int32_t>(ceil_div(shape_.group, 32) * 32);
}

// Every thread has something to do, and tables are not built more often than that needs.
int32_t LowBitMatrix::call_outputs(int64_t tiles, int threads) const {
  const int64_t parts = tiles >= threads ? 1 : ceil_div(threads, tiles);
  int64_t outputs = ceil_div(shape_.outputs, parts);
  if (kernel_ == LowBitKernel::kDense && tiles > 1) {
    outputs = std::min<int64_t>(outputs, kDenseCall);
  }
  // Lookups of ternary weights are of 64 outputs at a time.
  const int64_t whole = kernel_ == LowBitKernel::kRegisters ? 64 : kLowBitOutputs;
  return static_cast<int32_t>(ceil_div(outputs, whole) * whole);
}

LowBitMatrix::Scratch LowBitMatrix::scratch_of(int64_t n, int threads, uint8_t* memory) const {
  Scratch s{};
  s.rows = tile_width(n);
  s.tiles = ceil_div(n, s.rows);
  s.outputs = call_outputs(s.tiles, threads);
  s.tile_bytes = align64(static_cast<size_t>(groups()) * static_cast<size_t>(tile_depth()) *
                         static_cast<size_t>(s.rows));
  const size_t rows = static_cast<size_t>(n);
  const size_t sums = align64(static_cast<size_t>(s.rows) * static_cast<size_t>(s.outputs) * 4);
  s.worker_bytes = sums;
  if (kernel_ == LowBitKernel::kTables) {
    s.worker_bytes += align64(kernels_->lowbit_scratch_bytes(shape_, s.outputs));
  } else if (kernel_ == LowBitKernel::kRegisters) {
    s.worker_bytes += align64(kernels_->lowbit_register_scratch_bytes(shape_, s.rows));
  }
  size_t at = 0;
  const auto take = [&](size_t bytes) {
    uint8_t* const place = memory ? memory + at : nullptr;
    at += align64(bytes);
    return place;
  };
  s.x = reinterpret_cast<int8_t*>(take(rows * static_cast<size_t>(shape_.depth)));
  s.row_scale = reinterpret_cast<float*>(take(rows * sizeof(float)));
  s.x_sum = reinterpret_cast<int32_t*>(take(rows * static_cast<size_t>(groups()) * 4));
  s.tile = reinterpret_cast<int8_t*>(take(static_cast<size_t>(s.tiles) * s.tile_bytes));
  s.worker = take(static_cast<size_t>(threads) * s.worker_bytes);
  s.bytes = at;
  return s;
}

size_t LowBitMatrix::workspace_bytes(int64_t n, int threads) const {
  return scratch_of(n, threads, nullptr).bytes;
}

// The activations of a tile in the order of the kernel, and their sums.
void LowBitMatrix::prepare(const int8_t* x, int64_t n, const Scratch& s, int64_t tile) const {
  const size_t depth = static_cast<size_t>(shape_.depth);
  const int64_t first = tile * s.rows;
  const int32_t rows = static_cast<int32_t>(std::min<int64_t>(s.rows, n - first));
  const int8_t* const from = x + static_cast<size_t>(first) * depth;
  const int32_t width = tile_width(rows);
  int8_t* const to = s.tile + static_cast<size_t>(tile) * s.tile_bytes;
  std::memset(to, 0, s.tile_bytes);
  for (int32_t g = 0; g < groups(); ++g) {
    const size_t column = static_cast<size_t>(g) * static_cast<size_t>(shape_.group);
    int8_t* const place = to + static_cast<size_t>(g) * static_cast<size_t>(tile_depth()) *
                                   static_cast<size_t>(width);
    if (kernel_ == LowBitKernel::kTables) {
      to_table_tile(from + column, depth, rows, shape_.group, place);
    } else if (kernel_ == LowBitKernel::kRegisters) {
      for (int32_t r = 0; r < rows; ++r) {
        std::memcpy(place + static_cast<size_t>(r) * static_cast<size_t>(tile_depth()),
                    from + static_cast<size_t>(r) * depth + column,
                    static_cast<size_t>(shape_.group));
      }
    } else {
      to_dense_tile(from + column, depth, rows, width, shape_.group, place);
    }
    for (int32_t r = 0; r < rows; ++r) {
      const int8_t* const entries = from + static_cast<size_t>(r) * depth + column;
      int32_t sum = 0;
      for (int32_t k = 0; k < shape_.group; ++k) sum += entries[k];
      s.x_sum[static_cast<size_t>(g) * static_cast<size_t>(n) + static_cast<size_t>(first + r)] =
          sum;
    }
  }
}

template <class Done>
void LowBitMatrix::run(int64_t n, const Scratch& s, ThreadPool& pool, const Done& done) const {
  const double microseconds = static_cast<double>(n) * static_cast<double>(shape_.depth) *
                              shape_.outputs / kProductsPerMicrosecond;
  const int64_t calls = ceil_div(shape_.outputs, s.outputs);
  pool.run(static_cast<size_t>(calls * s.tiles), microseconds, [&](size_t index, int worker) {
    // Tiles first: they share the packed weights of a call.
    const int64_t tile = static_cast<int64_t>(index) % s.tiles;
    const int32_t from = static_cast<int32_t>(static_cast<int64_t>(index) / s.tiles) * s.outputs;
    const int32_t last = std::min(shape_.outputs, from + s.outputs);
    const int64_t first = tile * s.rows;
    const int32_t rows = static_cast<int32_t>(std::min<int64_t>(s.rows, n - first));
    const int32_t width = tile_width(rows);
    int32_t* const sums =
        reinterpret_cast<int32_t*>(s.worker + static_cast<size_t>(worker) * s.worker_bytes);
    uint8_t* const memory =
        reinterpret_cast<uint8_t*>(sums) +
        align64(static_cast<size_t>(s.rows) * static_cast<size_t>(s.outputs) * 4);
    const size_t stride = static_cast<size_t>(s.outputs);
    for (int32_t g = 0; g < groups(); ++g) {
      const int8_t* const in =
          s.tile + static_cast<size_t>(tile) * s.tile_bytes +
          static_cast<size_t>(g) * static_cast<size_t>(tile_depth()) * static_cast<size_t>(width);
      if (kernel_ == LowBitKernel::kTables) {
        kernels_->lowbit_tables(shape_, packed_.data(), g, in, rows, from, last, sums, stride,
                                memory);
      } else if (kernel_ == LowBitKernel::kRegisters) {
        kernels_->lowbit_registers(shape_, packed_.data(), g, in, rows, from, last, sums, stride,
                                   memory);
      } else {
        kernels_->lowbit_dense(shape_, packed_.data(), g, in, width, rows, from, last, sums,
                               stride);
      }
      done(first, rows, g, from, last - from, sums, stride);
    }
  });
}

void LowBitMatrix::matmul(const float* x, int64_t n, float* out, uint8_t* scratch,
                          ThreadPool& pool) const {
  const Scratch s = scratch_of(n, pool.threads(), scratch);
  const size_t depth = static_cast<size_t>(shape_.depth);
  const double microseconds = static_cast<double>(n) * static_cast<double>(depth) / 1e3;
  pool.run(static_cast<size_t>(s.tiles), microseconds, [&](size_t tile, int) {
    const int64_t first = static_cast<int64_t>(tile) * s.rows;
    for (int64_t r = first; r < std::min<int64_t>(n, first + s.rows); ++r) {
      const size_t at = static_cast<size_t>(r) * depth;
      s.row_scale[r] = kernels_->lowbit_quantize(x + at, depth, s.x + at);
    }
    prepare(s.x, n, s, static_cast<int64_t>(tile));
  });
  const ToLevels to = to_levels(kernel_, shape_.levels);
  const size_t outputs = static_cast<size_t>(shape_.outputs);
  run(n, s, pool,
      [&](int64_t row, int32_t rows, int32_t g, int32_t first, int32_t count, const int32_t* sums,
          size_t stride) {
        const size_t at = static_cast<size_t>(g) * outputs + static_cast<size_t>(first);
        const LowBitFinish finish{
            .times = to.times,
            .plus = to.plus,
            .zero = zero_.empty() ? nullptr : zero_.data() + at,
            .scale = scale_.data() + at,
            .x_sum = s.x_sum + static_cast<size_t>(g) * static_cast<size_t>(n) + row,
            .first = g == 0,
            .row_scale = g + 1 == groups() ? s.row_scale + row : nullptr};
        kernels_->lowbit_finish(finish, rows, count, sums, stride,
                                out + static_cast<size_t>(row) * outputs + first, outputs);
      });
}

void LowBitMatrix::sums(const int8_t* x, int64_t n, int32_t* out, uint8_t* scratch,
                        ThreadPool& pool) const {
  const Scratch s = scratch_of(n, pool.threads(), scratch);
  const ToLevels to = to_levels(kernel_, shape_.levels);
  const size_t outputs = static_cast<size_t>(shape_.outputs);
  pool.run(static_cast<size_t>(s.tiles), static_cast<double>(n) * shape_.depth / 1e3,
           [&](size_t tile, int) { prepare(x, n, s, static_cast<int64_t>(tile)); });
  run(n, s, pool,
      [&](int64_t row, int32_t rows, int32_t g, int32_t first, int32_t count, const int32_t* sums,
          size_t stride) {
        for (int32_t r = 0; r < rows; ++r) {
          const size_t at = static_cast<size_t>(row + r);
          const uint32_t x_sum =
              static_cast<uint32_t>(s.x_sum[static_cast<size_t>(g) * static_cast<size_t>(n) + at]);
          int32_t* const to_row =
              out + (at * static_cast<size_t>(groups()) + static_cast<size_t>(g)) * outputs + first;
          const int32_t* const from = sums + static_cast<size_t>(r) * stride;
          for (int32_t m = 0; m < count; ++m) {
            to_row[m] = static_cast<int32_t>(static_cast<uint32_t>(to.times) *
                                                 static_cast<uint32_t>(from[m]) +
                                             static_cast<uint32_t>(to.plus) * x_sum);
          }
        }
      });
}

}  // namespace lutra
