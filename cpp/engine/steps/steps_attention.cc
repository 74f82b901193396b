// Attention.
#include <algorithm>

#include "engine/core/memory.h"
#include "engine/core/op_registry.h"
#include "engine/steps/function_tables.h"

namespace lutra {
namespace {

// softmax(scale q k^T) v of every head; inputs q (N, T, D), k (N, S, D), v (N, S, D) and perhaps
// a mask (N, S) of integers, or of floats.
struct AttentionSettings {
  int64_t heads;
  float scale;
  bool causal;
  int64_t offset[3] = {};  // the first feature of q, k and v that is read
  int64_t width;           // how many are; -1: all of q
  bool float_mask;
  LineTable exp, reciprocal;
};

constexpr double kPerMicrosecond = 4e4;  // multiply-adds, a rough guess for one core
constexpr int64_t kQueries = 32;         // work items are multiples of these

// A work item is the queries of one head in one sample, or a part of them where threads would
// otherwise have nothing to do.
class AttentionStep : public Step {
 public:
  AttentionStep(const Kernels& kernels, AttentionSettings settings)
      : kernels_(kernels), s_(std::move(settings)) {
    require(s_.heads >= 1, "attention: heads must be at least 1, not %", s_.heads);
  }

  Shape infer(const Shapes& in) const override {
    const Shape &q = in[0], &k = in[1], &v = in[2];
    const std::string got =
        "attention got q " + q.text() + ", k " + k.text() + " and v " + v.text();
    require(q.rank == 3 && k.rank == 3 && v.rank == 3, "%; (N, tokens, features) is needed", got);
    require(k[0] == q[0] && v[0] == q[0] && k[1] == v[1],
            "%: the samples, or the tokens of k and v, differ", got);
    const int64_t width = features(q);
    require(width >= 1 && width % s_.heads == 0, "%: % features are not a multiple of % heads", got,
            width, s_.heads);
    for (int i = 0; i < 3; ++i) {
      require(s_.offset[i] >= 0 && s_.offset[i] + width <= in[static_cast<size_t>(i)][2],
              "%: features %..% of one of them do not exist", got, s_.offset[i],
              s_.offset[i] + width - 1);
    }
    if (in.size() > 3) {
      require(in[3] == Shape({q[0], k[1]}), "% and a mask %, which is not (N, tokens of k)", got,
              in[3]);
    }
    return {q[0], q[1], width};
  }

  bool reads_integers(size_t input) const override { return input == 3 && !s_.float_mask; }
  int max_quantized() const override { return kMaxQuantized; }
  std::string method(const Shapes&) const override {
    return s_.exp.empty() ? "float32" : "table of " + std::to_string(s_.exp.slope.size());
  }
  size_t parameter_bytes() const override { return s_.exp.bytes() + s_.reciprocal.bytes(); }
  size_t workspace(const Shapes& in, int threads) const override {
    return static_cast<size_t>(threads) * (scratch_bytes(in) + mask_bytes(in));
  }

  void run(const StepRun& r) const override {
    const int64_t samples = r.shapes[0][0], queries = r.shapes[0][1], keys = r.shapes[1][1];
    if (r.out_shape.size() == 0) return;
    const int64_t width = features(r.shapes[0]) / s_.heads, pairs = samples * s_.heads;
    const int64_t threads = r.pool.threads(), most = (queries + kQueries - 1) / kQueries;
    const int64_t wanted = threads == 1 ? 1 : (4 * threads + pairs - 1) / pairs;
    const int64_t part = (most + std::min(wanted, most) - 1) / std::min(wanted, most) * kQueries;
    const int64_t parts = (queries + part - 1) / part;
    const double work = 2.0 * static_cast<double>(pairs * width) * static_cast<double>(queries) *
                        static_cast<double>(keys);
    r.pool.run(static_cast<size_t>(pairs * parts), work / kPerMicrosecond,
               [&](size_t item, int worker) {
                 const int64_t pair = static_cast<int64_t>(item) / parts;
                 const int64_t first = static_cast<int64_t>(item) % parts * part;
                 one(r, pair / s_.heads, pair % s_.heads, first, std::min(queries, first + part),
                     static_cast<size_t>(worker));
               });
  }

 private:
  int64_t features(const Shape& q) const { return s_.width < 0 ? q[2] - s_.offset[0] : s_.width; }
  size_t scratch_bytes(const Shapes& in) const {
    return align64(kernels_.attention_bytes(static_cast<int32_t>(features(in[0]) / s_.heads),
                                            static_cast<int32_t>(in[1][1])));
  }
  static size_t mask_bytes(const Shapes& in) {
    return in.size() > 3 ? align64(static_cast<size_t>(in[1][1]) * sizeof(int32_t)) : 0;
  }

  // Queries first..last-1 of one head of one sample.
  void one(const StepRun& r, int64_t sample, int64_t head, int64_t first, int64_t last,
           size_t worker) const {
    const int64_t samples = r.shapes[0][0], queries = r.shapes[0][1], keys = r.shapes[1][1];
    const int64_t width = features(r.shapes[0]) / s_.heads;
    uint8_t* const scratch =
        r.workspace + worker * (scratch_bytes(r.shapes) + mask_bytes(r.shapes));
    const auto planes = [&](int i, int64_t tokens) {
      return r.inputs[static_cast<size_t>(i)] + (s_.offset[i] + head * width) * samples * tokens +
             sample * tokens;
    };
    Attention a{.width = static_cast<int32_t>(width),
                .keys = static_cast<int32_t>(keys),
                .causal = s_.causal,
                .past = 0,
                .scale = s_.scale,
                .q = planes(0, queries),
                .k = planes(1, keys),
                .v = planes(2, keys),
                .q_stride = static_cast<size_t>(samples * queries),
                .k_stride = static_cast<size_t>(samples * keys),
                .v_stride = static_cast<size_t>(samples * keys),
                .v_step = 1,
                .mask = nullptr,
                .exp = s_.exp.segments(),
                .reciprocal = s_.reciprocal.segments()};
    if (r.inputs.size() > 3) {  // stored (S, N)
      int32_t* const mask = reinterpret_cast<int32_t*>(scratch + scratch_bytes(r.shapes));
      const float* const from = r.inputs[3] + sample;
      for (int64_t j = 0; j < keys; ++j) {
        mask[j] = s_.float_mask ? from[j * samples] != 0 : integers_of(from)[j * samples];
      }
      a.mask = mask;
    }
    const int64_t at = (head * width) * samples * queries + sample * queries;
    const size_t stride = static_cast<size_t>(samples * queries);
    PlaneOutput out{
        .out = r.out ? r.out + at : nullptr, .stride = stride, .quantized = r.quantized, .q = {}};
    for (int i = 0; i < r.quantized; ++i) {
      out.q[i] = {.grid = r.q[i].grid, .out = r.q[i].data + at, .stride = stride};
    }
    kernels_.attention(a, static_cast<int32_t>(first), static_cast<int32_t>(last), out, scratch);
  }

  const Kernels& kernels_;
  AttentionSettings s_;
};

int add_any(PlanBuilder& plan, const StepArgs& args, bool float_mask) {
  auto [exp, reciprocal] = exp_tables(args);
  require(!args.input_shapes[0].empty(), "attention: the shape of q has no axes");
  AttentionSettings settings{.heads = args.integer("heads"),
                             .scale = args.float32("scale"),
                             .causal = args.flag("causal"),
                             .width = args.input_shapes[0].back(),
                             .float_mask = float_mask,
                             .exp = std::move(exp),
                             .reciprocal = std::move(reciprocal)};
  for (size_t i = 0; i < 3 && i < args.planes.size(); ++i) settings.offset[i] = args.planes[i];
  return add_step<AttentionStep>(plan, args, plan.kernels(), std::move(settings));
}

int add_attention(PlanBuilder& plan, const StepArgs& args) { return add_any(plan, args, false); }

int add_masked_attention(PlanBuilder& plan, const StepArgs& args) {
  return add_any(plan, args, true);
}

}  // namespace

void attention_ops(OpRegistry& r) {
  r.add("attention", {.build = add_attention, .inputs = 3, .most = 4, .reads_planes = true});
  r.add("masked_attention", {.build = add_masked_attention, .inputs = 4, .reads_planes = true});
}

}  // namespace lutra
