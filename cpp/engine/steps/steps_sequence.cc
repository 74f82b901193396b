// Steps that sequences need: tables read by ids, positions, means under a mask, picked entries.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "engine/core/memory.h"
#include "engine/core/op_registry.h"
#include "engine/steps/starts.h"

namespace lutra {
namespace {

using Inputs = std::vector<const float*>;

constexpr double kCopiedPerMicrosecond = 2e3;  // elements, a rough guess for one core
constexpr int64_t kTokens = 16;                // looked up together: a line of every plane

struct Positions {
  int64_t length, features;

  void check(const Shape& x) const {
    require(x.rank == 3 && x[2] == features,
            "a position embedding of % features got the shape %; it takes (N, T, %)", features, x,
            features);
    require(x[1] <= length,
            "sequences of % are too long; the longest that its table has positions for is %", x[1],
            length);
  }
};

// x (N, T, D) and perhaps start (N) of integers: x + weight[:T], or rows start[n].. for sequence n;
// weight (length, D)
class PositionStep : public FloatStep {
 public:
  PositionStep(int64_t length, int64_t features, const float* weight)
      : positions_{length, features}, planes_(static_cast<size_t>(length * features)) {
    require(length >= 1 && features >= 1, "a position embedding needs at least one row");
    copy_strided(Shape{features, length}, weight, {1, features}, planes_.data(), {length, 1});
  }
  bool reads_integers(size_t input) const override { return input == 1; }
  Shape infer(const Shapes& in) const override {
    positions_.check(in[0]);
    require(in.size() == 1 || in[1] == Shape({in[0][0]}),
            "a position embedding got the shape % and starts that are not (N)", in[0]);
    return in[0];
  }
  size_t parameter_bytes() const override { return planes_.size() * sizeof(float); }
  const Positions& positions() const { return positions_; }
  // The table as it was given, (length, features).
  std::vector<float> rows() const {
    const auto [length, features] = positions_;
    std::vector<float> rows(planes_.size());
    copy_strided(Shape{length, features}, planes_.data(), {1, length}, rows.data(), {features, 1});
    return rows;
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape&, float* out, uint8_t*,
           ThreadPool& pool) const override {
    const int64_t batch = shapes[0][0], length = shapes[0][1];
    const int32_t* const start = in.size() > 1 ? integers_of(in[1]) : nullptr;
    if (start) check_starts(start, batch, length, positions_.length);
    pool.run(static_cast<size_t>(positions_.features),
             static_cast<double>(shapes[0].size()) / kCopiedPerMicrosecond, [&](size_t d, int) {
               const float* const rows =
                   planes_.data() + static_cast<int64_t>(d) * positions_.length;
               for (int64_t n = 0; n < batch; ++n) {
                 const int64_t at = (static_cast<int64_t>(d) * batch + n) * length;
                 const float* const w = rows + (start ? start[n] : 0);
                 for (int64_t t = 0; t < length; ++t) out[at + t] = in[0][at + t] + w[t];
               }
             });
  }

 private:
  Positions positions_;
  std::vector<float> planes_;  // (features, length)
};

// ids (N, ...) -> (N, ..., D): int32, or floats that are whole numbers, or are rounded to them. The
// rows of the table (rows, D) are float32, or int8 with a scale for each. run() throws
// std::invalid_argument for an id outside 0..rows-1.
//
// The id of every token in the order of the rows of the output: row-major for values of up to three
// axes, in the order of memory for more.
class EmbeddingStep : public FloatStep {
 public:
  EmbeddingStep(bool integers, int64_t rows, int64_t features, std::vector<float> weight,
                std::vector<int8_t> bytes, std::vector<float> scale)
      : integers_(integers),
        rows_(rows),
        features_(features),
        weight_(std::move(weight)),
        bytes_(std::move(bytes)),
        scale_(std::move(scale)) {
    require(rows >= 1 && features >= 1, "an embedding needs at least one row and one feature");
    require(rows <= std::numeric_limits<int32_t>::max(), "an embedding has too many rows");
  }

  bool reads_integers(size_t) const override { return integers_; }
  Shape infer(const Shapes& in) const override {
    Shape y = in[0];
    require(y.rank < kMaxRank, "an embedding of ids % has more than 8 axes", y);
    y[y.rank++] = features_;
    if (positions_) positions_->check(y);
    return y;
  }
  // Adds positions while the rows are at hand.
  bool absorb(const Step& next) override {
    const auto* const step = dynamic_cast<const PositionStep*>(&next);
    if (!step || positions_) return false;
    positions_ = step->positions();
    position_rows_ = step->rows();
    return true;
  }
  size_t workspace(const Shapes& in, int threads) const override {
    return ids_bytes(in[0].size()) + static_cast<size_t>(threads) * block_bytes();
  }
  std::string method(const Shapes&) const override { return bytes_.empty() ? "float32" : "int8"; }
  size_t parameter_bytes() const override {
    return (weight_.size() + scale_.size() + position_rows_.size()) * sizeof(float) + bytes_.size();
  }

  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t* workspace,
           ThreadPool& pool) const override {
    const Shape& ids = shapes[0];
    const int64_t count = ids.size();
    // In the order of the output's rows, so that these are next to each other.
    Shape order;
    Dims from{}, to{};
    const Dims id_strides = storage_strides(ids);
    const Dims out_strides = storage_strides(y);
    const bool planes = plane_axis(y.rank) == y.rank - 1;
    for (int i = 0; i < ids.rank; ++i) {
      order[order.rank++] = ids[i];
      from[i] = id_strides[i];
      to[i] = planes ? out_strides[i] : out_strides[i] / features_;
    }
    float* const sorted = reinterpret_cast<float*>(workspace);
    copy_strided(order, in[0], from, sorted, to);
    if (!integers_) round_ids(sorted, count);
    const int32_t* const id = integers_of(sorted);
    for (int64_t i = 0; i < count; ++i) {
      require(id[i] >= 0 && id[i] < rows_, "the id % is outside its table of % rows, 0..%", id[i],
              rows_, rows_ - 1);
    }
    uint8_t* const blocks = workspace + ids_bytes(count);
    pool.run(static_cast<size_t>((count + kTokens - 1) / kTokens),
             static_cast<double>(y.size()) / kCopiedPerMicrosecond, [&](size_t item, int worker) {
               const int64_t first = static_cast<int64_t>(item) * kTokens;
               const int64_t some = std::min(kTokens, count - first);
               if (!planes) {
                 for (int64_t t = 0; t < some; ++t)
                   read(id[first + t], out + (first + t) * features_);
                 return;
               }
               float* const block =
                   reinterpret_cast<float*>(blocks + static_cast<size_t>(worker) * block_bytes());
               for (int64_t t = 0; t < some; ++t) {
                 float* const row = block + t * features_;
                 read(id[first + t], row);
                 if (positions_) add_position((first + t) % ids[1], row);
               }
               copy_strided(Shape{features_, some}, block, {1, features_}, out + first, {count, 1});
             });
  }

 private:
  static size_t ids_bytes(int64_t count) {
    return align64(static_cast<size_t>(count) * sizeof(int32_t));
  }
  size_t block_bytes() const {
    return align64(static_cast<size_t>(kTokens * features_) * sizeof(float));
  }

  void read(int32_t id, float* to) const {
    const size_t at = static_cast<size_t>(id) * static_cast<size_t>(features_);
    if (bytes_.empty()) {
      std::memcpy(to, weight_.data() + at, static_cast<size_t>(features_) * sizeof(float));
      return;
    }
    const int8_t* const row = bytes_.data() + at;
    const float scale = scale_[static_cast<size_t>(id)];
    for (int64_t d = 0; d < features_; ++d) to[d] = static_cast<float>(row[d]) * scale;
  }
  void add_position(int64_t position, float* to) const {
    const float* const row = position_rows_.data() + position * features_;
    for (int64_t d = 0; d < features_; ++d) to[d] = to[d] + row[d];
  }

  // Floats to int32 in their place; -1 for NaN, and 2^31 - 1 for what is larger.
  static void round_ids(float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const float whole = std::nearbyint(values[i]);
      int32_t id = whole >= 2147483648.0f ? std::numeric_limits<int32_t>::max() : -1;
      if (whole >= 0.0f && whole < 2147483648.0f) id = static_cast<int32_t>(whole);
      std::memcpy(values + i, &id, sizeof(id));
    }
  }

  bool integers_;
  int64_t rows_, features_;
  std::vector<float> weight_;  // or
  std::vector<int8_t> bytes_;
  std::vector<float> scale_;
  std::optional<Positions> positions_;
  std::vector<float> position_rows_;  // (length, features)
};

// x (N, T, D), mask int32 (N, T) -> sum(x * mask) / max(sum(mask), 1e-9), (N, D)
class MaskedMeanStep : public FloatStep {
 public:
  bool reads_integers(size_t input) const override { return input == 1; }
  Shape infer(const Shapes& in) const override {
    const Shape &x = in[0], &mask = in[1];
    require(x.rank == 3 && mask.rank == 2 && mask[0] == x[0] && mask[1] == x[1],
            "a masked mean of % got a mask %; it takes (N, T, D) and (N, T)", x, mask);
    return {x[0], x[2]};
  }
  size_t workspace(const Shapes& in, int) const override {
    return static_cast<size_t>(in[1].size()) * sizeof(float) +
           static_cast<size_t>(in[1][0]) * sizeof(double);
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape&, float* out, uint8_t* workspace,
           ThreadPool& pool) const override {
    const int64_t batch = shapes[0][0], length = shapes[0][1], features = shapes[0][2];
    double* const count = reinterpret_cast<double*>(workspace);
    float* const mask = reinterpret_cast<float*>(count + batch);  // (N, T)
    for (int64_t n = 0; n < batch; ++n) {
      double sum = 0.0;
      for (int64_t t = 0; t < length; ++t) {
        const int32_t m = integers_of(in[1])[t * batch + n];
        mask[n * length + t] = static_cast<float>(m);
        sum += m;
      }
      count[n] = std::max(sum, 1e-9);
    }
    pool.run(static_cast<size_t>(features),
             static_cast<double>(shapes[0].size()) / kCopiedPerMicrosecond, [&](size_t d, int) {
               for (int64_t n = 0; n < batch; ++n) {
                 const int64_t at = static_cast<int64_t>(d) * batch + n;
                 const double sum = dot(in[0] + at * length, mask + n * length, length);
                 out[at] = static_cast<float>(sum / count[n]);
               }
             });
  }

 private:
  // Sums in float64, eight side by side.
  static double dot(const float* x, const float* mask, int64_t length) {
    constexpr int64_t kLanes = 8;
    double lanes[kLanes] = {};
    int64_t t = 0;
    for (; t + kLanes <= length; t += kLanes) {
      for (int64_t k = 0; k < kLanes; ++k) {
        lanes[k] += static_cast<double>(x[t + k] * mask[t + k]);
      }
    }
    double sum = 0.0;
    for (; t < length; ++t) sum += static_cast<double>(x[t] * mask[t]);
    for (const double lane : lanes) sum += lane;
    return sum;
  }
};

// The entries `index` of an axis, in this order: numpy.take.
class GatherStep : public FloatStep {
 public:
  GatherStep(std::vector<int32_t> index, int axis) : index_(std::move(index)), axis_(axis) {
    require(!index_.empty(), "gather: it takes nothing");
    require(axis >= 1 && axis < kMaxRank, "gather: axis % is not 1..7", axis);
  }
  Shape infer(const Shapes& in) const override {
    Shape y = in[0];
    require(axis_ < y.rank, "gather: no axis % in %", axis_, y);
    for (const int32_t i : index_) {
      require(i >= 0 && i < y[axis_], "gather: the index % is outside axis % of %", i, axis_, y);
    }
    y[axis_] = static_cast<int64_t>(index_.size());
    return y;
  }
  void run(const Shapes& shapes, const Inputs& in, const Shape& y, float* out, uint8_t*,
           ThreadPool& pool) const override {
    const int64_t size = shapes[0][axis_], taken = y[axis_];
    const int64_t inner = storage_strides(shapes[0])[axis_];
    const int64_t outer = shapes[0].size() / std::max<int64_t>(size * inner, 1);
    pool.run(static_cast<size_t>(outer), static_cast<double>(y.size()) / kCopiedPerMicrosecond,
             [&](size_t item, int) {
               const float* const from = in[0] + static_cast<int64_t>(item) * size * inner;
               float* const to = out + static_cast<int64_t>(item) * taken * inner;
               for (int64_t i = 0; i < taken; ++i) {
                 std::copy_n(from + index_[static_cast<size_t>(i)] * inner, inner, to + i * inner);
               }
             });
  }

 private:
  std::vector<int32_t> index_;
  int axis_;
};

int add_embedding(PlanBuilder& plan, const StepArgs& args) {
  const bool integers = plan.is_integer_input(args.inputs[0]);
  const auto found = args.tensors.find("weight");
  if (found != args.tensors.end() && found->second.dtype == Dtype::kInt8) {
    const Tensor<int8_t> weight = args.tensor<int8_t>("weight", 2);
    require(args.has("scale") && args.tensor<float>("scale", 1)[0] == weight[0],
            "an embedding of int8 needs a scale for each of its rows");
    return add_step<EmbeddingStep>(plan, args, integers, weight[0], weight[1], std::vector<float>(),
                                   weight.values(), args.tensor<float>("scale", 1).values());
  }
  const bool other = found != args.tensors.end() && found->second.dtype != Dtype::kFloat32;
  require(!other, "an embedding is float32 or int8");
  const Tensor<float> weight = args.tensor<float>("weight", 2);
  require(!args.has("scale"), "an embedding of float32 takes no scale");
  return add_step<EmbeddingStep>(plan, args, integers, weight[0], weight[1], weight.values(),
                                 std::vector<int8_t>(), std::vector<float>());
}

int add_position_embedding(PlanBuilder& plan, const StepArgs& args) {
  const Tensor<float> weight = args.tensor<float>("weight", 2);
  return add_step<PositionStep>(plan, args, weight[0], weight[1], weight.data);
}

int add_masked_mean(PlanBuilder& plan, const StepArgs& args) {
  return add_step<MaskedMeanStep>(plan, args);
}

int add_gather(PlanBuilder& plan, const StepArgs& args) {
  return add_step<GatherStep>(plan, args, args.tensor<int32_t>("index", 1).values(),
                              args.int32("axis"));
}

}  // namespace

void sequence_ops(OpRegistry& r) {
  r.add("embedding", {.build = add_embedding});
  r.add("position_embedding", {.build = add_position_embedding, .inputs = 1, .most = 2});
  r.add("masked_mean", {.build = add_masked_mean, .inputs = 2});
  r.add("gather", {.build = add_gather});
}

}  // namespace lutra
