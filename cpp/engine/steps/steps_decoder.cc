// Steps of decoders: attention over what is remembered of each sequence, and the tokens whose
// results are wanted.
#include <algorithm>
#include <vector>

#include "engine/core/cache.h"
#include "engine/core/memory.h"
#include "engine/core/op_registry.h"
#include "engine/steps/function_tables.h"

namespace lutra {
namespace {

struct DecoderAttention {
  int64_t heads, kv_heads;
  int64_t length;  // the most tokens of a sequence
  float scale;
  int64_t offset[3] = {};  // the first feature of q, k and v that is read
  int64_t width;           // of q
  LineTable exp, reciprocal;
};

constexpr double kPerMicrosecond = 4e4;  // multiply-adds, a rough guess for one core
constexpr double kCopiedPerMicrosecond = 2e3;
constexpr int64_t kQueries = 32;    // work items are multiples of these
constexpr int64_t kFewQueries = 4;  // these are computed one by one: keys are lanes then

// Inputs q (N, T, heads d), k and v (N, T, kv_heads d), start (N) of integers: sequence n continues
// after its first start[n] tokens. Of what a sequence has, keys lie in planes (kv_heads d, L) and
// values in rows (kv_heads, L, d), so that lanes can be keys for the scores of one query, and
// features for its result.
class CachedAttentionStep : public Step {
 public:
  CachedAttentionStep(const Kernels& kernels, DecoderAttention settings)
      : kernels_(kernels), s_(std::move(settings)) {
    require(s_.heads >= 1 && s_.kv_heads >= 1 && s_.heads % s_.kv_heads == 0,
            "cached_attention: % heads of keys do not divide % heads", s_.kv_heads, s_.heads);
    require(s_.width >= 1 && s_.width % s_.heads == 0 && s_.length >= 1,
            "cached_attention: % features are not a multiple of % heads", s_.width, s_.heads);
  }

  Shape infer(const Shapes& in) const override {
    const Shape &q = in[0], &k = in[1], &v = in[2];
    const std::string got =
        "cached_attention got q " + q.text() + ", k " + k.text() + " and v " + v.text();
    require(q.rank == 3 && k.rank == 3 && v.rank == 3, "%; (N, tokens, features) is needed", got);
    for (size_t i = 0; i < 3; ++i) {
      const int64_t features = i == 0 ? s_.width : s_.kv_heads * head();
      require(in[i][0] == q[0] && in[i][1] == q[1], "%: samples or tokens differ", got);
      require(s_.offset[i] >= 0 && s_.offset[i] + features <= in[i][2],
              "%: features %..% of one of them do not exist", got, s_.offset[i],
              s_.offset[i] + features - 1);
    }
    require(in[3] == Shape({q[0]}), "% and starts %, which are not (N)", got, in[3]);
    require(q[1] <= s_.length, "%: a sequence has % tokens at most", got, s_.length);
    return {q[0], q[1], s_.width};
  }

  bool reads_integers(size_t input) const override { return input == 3; }
  int max_quantized() const override { return kMaxQuantized; }
  std::string method(const Shapes&) const override {
    return s_.exp.empty() ? "float32" : "table of " + std::to_string(s_.exp.slope.size());
  }
  size_t parameter_bytes() const override { return s_.exp.bytes() + s_.reciprocal.bytes(); }
  PastShape remembers() const override {
    return {{{s_.kv_heads * head(), 1}, {s_.kv_heads, head()}}, s_.length};
  }
  size_t workspace(const Shapes& in, int threads) const override {
    return static_cast<size_t>(threads) * scratch_bytes(in[0][1]);
  }

  void run(const StepRun& r) const override {
    const int64_t samples = r.shapes[0][0], queries = r.shapes[0][1];
    if (r.out_shape.size() == 0) return;
    const int32_t* const start = integers_of(r.inputs[3]);
    check_starts(r, start);
    if (r.past) remember(r, start);
    const int64_t pairs = samples * s_.heads;
    const int64_t threads = r.pool.threads(), most = (queries + kQueries - 1) / kQueries;
    const int64_t wanted = threads == 1 ? 1 : (4 * threads + pairs - 1) / pairs;
    const int64_t part = (most + std::min(wanted, most) - 1) / std::min(wanted, most) * kQueries;
    const int64_t parts = (queries + part - 1) / part;
    double keys = 0.0;
    for (int64_t n = 0; n < samples; ++n) keys += static_cast<double>(start[n] + queries);
    const double work = 2.0 * static_cast<double>(s_.width * queries) * keys;
    r.pool.run(static_cast<size_t>(pairs * parts), work / kPerMicrosecond,
               [&](size_t item, int worker) {
                 const int64_t pair = static_cast<int64_t>(item) / parts;
                 const int64_t first = static_cast<int64_t>(item) % parts * part;
                 one(r, pair / s_.heads, pair % s_.heads, start[pair / s_.heads], first,
                     std::min(queries, first + part), static_cast<size_t>(worker));
               });
  }

 private:
  int64_t head() const { return s_.width / s_.heads; }
  size_t scratch_bytes(int64_t queries) const {
    const auto bytes =
        queries <= kFewQueries ? kernels_.attention_row_bytes : kernels_.attention_bytes;
    // a run without a cache has the keys of its own tokens only, in planes
    return align64(std::max(
        bytes(static_cast<int32_t>(head()), static_cast<int32_t>(s_.length)),
        kernels_.attention_bytes(static_cast<int32_t>(head()), static_cast<int32_t>(queries))));
  }

  void check_starts(const StepRun& r, const int32_t* start) const {
    const int64_t samples = r.shapes[0][0], tokens = r.shapes[0][1];
    for (int64_t n = 0; n < samples; ++n) {
      const std::string where =
          "sequence " + std::to_string(n) + " starts at token " + std::to_string(start[n]);
      const int64_t filled = r.past ? r.past->filled[static_cast<size_t>(r.first + n)] : 0;
      require(start[n] >= 0 && start[n] <= filled, "%%", where,
              (r.past ? ", but the cache holds " + std::to_string(filled) + " tokens of it"
                      : ", but the run has no cache: start at 0"));
      require(start[n] + tokens <= s_.length, "% and gets % more, but may have % at most", where,
              tokens, s_.length);
    }
  }

  // Writes keys and values of the new tokens behind those that are there.
  void remember(const StepRun& r, const int32_t* start) const {
    const int64_t samples = r.shapes[0][0], tokens = r.shapes[0][1], width = head();
    const int64_t end = *std::max_element(start, start + samples) + tokens;
    r.past->reserve(end);
    const int64_t capacity = r.past->capacity(), plane = samples * tokens;
    r.pool.run(static_cast<size_t>(samples * s_.kv_heads),
               static_cast<double>(2 * plane * s_.kv_heads * width) / kCopiedPerMicrosecond,
               [&](size_t item, int) {
                 const int64_t n = static_cast<int64_t>(item) / s_.kv_heads;
                 const int64_t g = static_cast<int64_t>(item) % s_.kv_heads;
                 float* const keys = r.past->data(0, r.first + n) + g * width * capacity + start[n];
                 float* const values =
                     r.past->data(1, r.first + n) + (g * capacity + start[n]) * width;
                 for (int64_t d = 0; d < width; ++d) {
                   const float* const k = planes(r, 1, n, g) + d * plane;
                   const float* const v = planes(r, 2, n, g) + d * plane;
                   std::copy_n(k, tokens, keys + d * capacity);
                   for (int64_t t = 0; t < tokens; ++t) values[t * width + d] = v[t];
                 }
               });
    for (int64_t n = 0; n < samples; ++n) {
      r.past->filled[static_cast<size_t>(r.first + n)] = start[n] + tokens;
    }
  }

  // The first plane of a head of an input, at a sample.
  const float* planes(const StepRun& r, size_t input, int64_t sample, int64_t of) const {
    const int64_t samples = r.shapes[0][0], tokens = r.shapes[0][1];
    return r.inputs[input] + (s_.offset[input] + of * head()) * samples * tokens + sample * tokens;
  }

  // Queries first..last-1 of one head of one sample.
  void one(const StepRun& r, int64_t sample, int64_t of, int64_t start, int64_t first, int64_t last,
           size_t worker) const {
    const int64_t samples = r.shapes[0][0], tokens = r.shapes[0][1], width = head();
    const int64_t group = of / (s_.heads / s_.kv_heads);
    const size_t plane = static_cast<size_t>(samples * tokens);
    uint8_t* const scratch = r.workspace + worker * scratch_bytes(tokens);
    Attention a{.width = static_cast<int32_t>(width),
                .keys = static_cast<int32_t>(start + last),
                .causal = true,
                .past = static_cast<int32_t>(start),
                .scale = s_.scale,
                .q = planes(r, 0, sample, of),
                .k = nullptr,
                .v = nullptr,
                .q_stride = plane,
                .k_stride = plane,
                .v_stride = plane,
                .v_step = 1,
                .mask = nullptr,
                .exp = s_.exp.segments(),
                .reciprocal = s_.reciprocal.segments()};
    if (r.past) {
      const int64_t capacity = r.past->capacity();
      a.k = r.past->data(0, r.first + sample) + group * width * capacity;
      a.v = r.past->data(1, r.first + sample) + group * width * capacity;
      a.k_stride = static_cast<size_t>(capacity);
      a.v_stride = 1;
      a.v_step = static_cast<size_t>(width);
    } else {
      a.k = planes(r, 1, sample, group);
      a.v = planes(r, 2, sample, group);
    }
    const int64_t at = of * width * samples * tokens + sample * tokens;
    PlaneOutput out{
        .out = r.out ? r.out + at : nullptr, .stride = plane, .quantized = r.quantized, .q = {}};
    for (int i = 0; i < r.quantized; ++i) {
      out.q[i] = {.grid = r.q[i].grid, .out = r.q[i].data + at, .stride = plane};
    }
    if (r.past && tokens <= kFewQueries) {
      for (int64_t i = first; i < last; ++i) {
        kernels_.attention_row(a, static_cast<int32_t>(i), out, scratch);
      }
    } else {
      kernels_.attention(a, static_cast<int32_t>(first), static_cast<int32_t>(last), out, scratch);
    }
  }

  const Kernels& kernels_;
  DecoderAttention s_;
};

// x (N, T, D) and index (N, P) of integers -> (N, P, D): y[n, p] = x[n, index[n, p]]
class PickTokensStep : public FloatStep {
 public:
  Shape infer(const Shapes& in) const override {
    require(in[0].rank == 3 && in[1].rank == 2 && in[1][0] == in[0][0],
            "pick_tokens got x % and an index %; (N, T, D) and (N, P) are needed", in[0], in[1]);
    return {in[0][0], in[1][1], in[0][2]};
  }
  bool reads_integers(size_t input) const override { return input == 1; }

 protected:
  void run(const Shapes& shapes, const std::vector<const float*>& in, const Shape& out_shape,
           float* out, uint8_t*, ThreadPool& pool) const override {
    const int64_t samples = out_shape[0], picks = out_shape[1], tokens = shapes[0][1];
    const int32_t* const index = integers_of(in[1]);  // stored (P, N)
    for (int64_t i = 0; i < samples * picks; ++i) {
      require(index[i] >= 0 && index[i] < tokens,
              "token % of sequence % is picked, and the run has the tokens 0..%", index[i],
              i % samples, tokens - 1);
    }
    pool.run(static_cast<size_t>(out_shape[2]),
             static_cast<double>(out_shape.size()) / kCopiedPerMicrosecond, [&](size_t item, int) {
               const int64_t d = static_cast<int64_t>(item);
               for (int64_t n = 0; n < samples; ++n) {
                 const float* const x = in[0] + (d * samples + n) * tokens;
                 float* const y = out + (d * samples + n) * picks;
                 for (int64_t p = 0; p < picks; ++p) y[p] = x[index[p * samples + n]];
               }
             });
  }
};

int add_cached_attention(PlanBuilder& plan, const StepArgs& args) {
  auto [exp, reciprocal] = exp_tables(args);
  require(!args.input_shapes[0].empty(), "cached_attention: the shape of q has no axes");
  DecoderAttention settings{.heads = args.integer("heads"),
                            .kv_heads = args.integer("kv_heads"),
                            .length = args.integer("length"),
                            .scale = args.float32("scale"),
                            .width = args.input_shapes[0].back(),
                            .exp = std::move(exp),
                            .reciprocal = std::move(reciprocal)};
  for (size_t i = 0; i < 3 && i < args.planes.size(); ++i) settings.offset[i] = args.planes[i];
  return add_step<CachedAttentionStep>(plan, args, plan.kernels(), std::move(settings));
}

int add_pick_tokens(PlanBuilder& plan, const StepArgs& args) {
  return add_step<PickTokensStep>(plan, args);
}

}  // namespace

void decoder_ops(OpRegistry& r) {
  r.add("cached_attention", {.build = add_cached_attention, .inputs = 4, .reads_planes = true});
  r.add("pick_tokens", {.build = add_pick_tokens, .inputs = 2});
}

}  // namespace lutra
