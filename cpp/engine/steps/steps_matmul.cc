// Products of two values.
#include <algorithm>

#include "engine/core/memory.h"
#include "engine/core/op_registry.h"

namespace lutra {
namespace {

constexpr double kMultipliedPerMicrosecond = 2e4;  // a rough guess for one core

// a (N, ..., M, K), b (N, ..., K, P) -> (N, ..., M, P); the last two axes of either may be swapped,
// and the axes before them are equal or 1. Every sum is an fma chain in the order of k.
//
// The kernel multiplies a tile of rows, whose outputs it writes next to each other, with weights.
// So the rows of the tiles are the axis of the output that is consecutive in memory, which is the
// first of the two for rank 3 and the last for more; the other operand is packed as the weights.
class MatmulStep : public Step {
 public:
  MatmulStep(const Kernels& kernels, bool transpose_a, bool transpose_b)
      : kernels_(kernels), transpose_a_(transpose_a), transpose_b_(transpose_b) {}

  Shape infer(const Shapes& in) const override {
    const Shape &a = in[0], &b = in[1];
    const std::string shapes = a.text() + " and " + b.text();
    require(a.rank == b.rank && a.rank >= 3,
            "matmul: the shapes % must have the same rank of at least 3", shapes);
    const int last = a.rank - 1;
    require(a[last - (transpose_a_ ? 1 : 0)] == b[last - (transpose_b_ ? 0 : 1)],
            "matmul: the inner sizes of % differ", shapes);
    Shape y = a;
    for (int i = 0; i < last - 1; ++i) {
      require(a[i] == b[i] || a[i] == 1 || b[i] == 1, "matmul: axis % of % is neither equal nor 1",
              i, shapes);
      y[i] = a[i] == 1 ? b[i] : a[i];
    }
    y[last - 1] = a[last - (transpose_a_ ? 0 : 1)];
    y[last] = b[last - (transpose_b_ ? 1 : 0)];
    return y;
  }

  std::string method(const Shapes&) const override { return "float32"; }

  size_t workspace(const Shapes& in, int threads) const override {
    const Sizes s(*this, in, infer(in));
    return align64(s.zeros() * sizeof(float)) + static_cast<size_t>(threads) * s.worker_bytes();
  }

  void run(const StepRun& r) const override {
    const Sizes s(*this, r.shapes, r.out_shape);
    float* const zeros = reinterpret_cast<float*>(r.workspace);  // the bias of the epilogue
    std::fill(zeros, zeros + s.zeros(), 0.0f);
    uint8_t* const workers = r.workspace + align64(s.zeros() * sizeof(float));
    // The tiles of one product are shared out only if there are fewer products than threads: each
    // work item packs the weights.
    const int64_t wanted = (r.pool.threads() + s.products - 1) / std::max<int64_t>(s.products, 1);
    const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(s.tiles, 1));
    const double work =
        static_cast<double>(s.products * s.depth) * static_cast<double>(s.rows * s.outputs);
    r.pool.run(static_cast<size_t>(s.products * parts), work / kMultipliedPerMicrosecond,
               [&](size_t item, int worker) {
                 const int64_t product = static_cast<int64_t>(item) / parts;
                 const int64_t part = static_cast<int64_t>(item) % parts;
                 float* const memory = reinterpret_cast<float*>(
                     workers + static_cast<size_t>(worker) * s.worker_bytes());
                 const float *row_side, *output_side;
                 float* out = r.out;
                 s.place(product, r, row_side, output_side, out);
                 multiply(s, row_side, output_side, out, part * s.tiles / parts,
                          (part + 1) * s.tiles / parts, zeros, memory);
               });
  }

 private:
  struct Sizes {
    int64_t rows, outputs, depth, tile, tiles, products;
    bool swapped;  // rows are the columns of b, outputs the rows of a
    int64_t row_step, row_depth_step, output_step, output_depth_step, out_step;
    Dims a{}, b{}, y{};  // strides of the axes before the last two; 0 where repeated
    Shape batch;

    Sizes(const MatmulStep& m, const Shapes& in, const Shape& shape) {
      const int last = shape.rank - 1;
      const Dims sa = storage_strides(in[0]), sb = storage_strides(in[1]),
                 sy = storage_strides(shape);
      const int a_row = last - (m.transpose_a_ ? 0 : 1), a_depth = last - (m.transpose_a_ ? 1 : 0);
      const int b_depth = last - (m.transpose_b_ ? 0 : 1), b_col = last - (m.transpose_b_ ? 1 : 0);
      swapped = plane_axis(shape.rank) != last;
      rows = shape[swapped ? last : last - 1];
      outputs = shape[swapped ? last - 1 : last];
      depth = in[0][a_depth];
      row_step = swapped ? sb[b_col] : sa[a_row];
      row_depth_step = swapped ? sb[b_depth] : sa[a_depth];
      output_step = swapped ? sa[a_row] : sb[b_col];
      output_depth_step = swapped ? sa[a_depth] : sb[b_depth];
      out_step = sy[swapped ? last - 1 : last];
      tile = m.kernels_.row_tile;
      tiles = (rows + tile - 1) / tile;
      products = 1;
      for (int i = 0; i < last - 1; ++i) {
        batch[batch.rank++] = shape[i];
        products *= shape[i];
        a[i] = in[0][i] == 1 ? 0 : sa[i];
        b[i] = in[1][i] == 1 ? 0 : sb[i];
        y[i] = sy[i];
      }
    }
    size_t zeros() const { return static_cast<size_t>(outputs); }
    int64_t blocks() const { return (outputs + kGemmOutputs - 1) / kGemmOutputs; }
    size_t patch_floats() const {
      return static_cast<size_t>(depth * tile) + kSlack / sizeof(float);
    }
    size_t worker_bytes() const {
      const size_t weights = static_cast<size_t>(blocks() * depth * kGemmOutputs);
      return align64((patch_floats() + weights) * sizeof(float));
    }
    // Where the operands and the result of one product begin.
    void place(int64_t product, const StepRun& r, const float*& row_side, const float*& output_side,
               float*& out) const {
      const float *at_a = r.inputs[0], *at_b = r.inputs[1];
      for (int i = batch.rank - 1; i >= 0; product /= batch[i--]) {
        const int64_t index = product % batch[i];
        at_a += index * a[i];
        at_b += index * b[i];
        out += index * y[i];
      }
      row_side = swapped ? at_b : at_a;
      output_side = swapped ? at_a : at_b;
    }
  };

  void multiply(const Sizes& s, const float* row_side, const float* output_side, float* out,
                int64_t first_tile, int64_t last_tile, const float* zeros, float* memory) const {
    float* const patch = memory;
    float* const weights = memory + s.patch_floats();
    const int64_t whole = s.outputs / kGemmOutputs, left = s.outputs % kGemmOutputs;
    const int64_t block = s.depth * kGemmOutputs;
    copy_strided(Shape{whole, s.depth, kGemmOutputs}, output_side,
                 {kGemmOutputs * s.output_step, s.output_depth_step, s.output_step}, weights,
                 {block, kGemmOutputs, 1});
    if (left > 0) {
      float* const rest = weights + whole * block;
      std::fill(rest, rest + block, 0.0f);
      copy_strided(Shape{s.depth, left}, output_side + whole * kGemmOutputs * s.output_step,
                   {s.output_depth_step, s.output_step}, rest, {kGemmOutputs, 1});
    }
    for (int64_t t = first_tile; t < last_tile; ++t) {
      const int64_t first = t * s.tile, count = std::min(s.tile, s.rows - first);
      copy_strided(Shape{s.depth, count}, row_side + first * s.row_step,
                   {s.row_depth_step, s.row_step}, patch, {s.tile, 1});
      for (int64_t d = 0; count < s.tile && d < s.depth; ++d) {  // lanes of no row
        std::fill(patch + d * s.tile + count, patch + (d + 1) * s.tile, 0.0f);
      }
      kernels_.gemm(patch, static_cast<size_t>(s.depth), weights, static_cast<int32_t>(s.outputs),
                    {.bias = zeros,
                     .out = out + first,
                     .out_stride = static_cast<size_t>(s.out_step),
                     .rows = static_cast<int32_t>(count)});
    }
  }

  const Kernels& kernels_;
  bool transpose_a_, transpose_b_;
};

int add_matmul(PlanBuilder& plan, const StepArgs& args) {
  return add_step<MatmulStep>(plan, args, plan.kernels(), args.flag("transpose_a"),
                              args.flag("transpose_b"));
}

}  // namespace

void matmul_ops(OpRegistry& r) { r.add("matmul", {.build = add_matmul, .inputs = 2}); }

}  // namespace lutra
