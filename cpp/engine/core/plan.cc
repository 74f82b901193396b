#include "engine/core/plan.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <stdexcept>

#include "engine/core/quantize_step.h"

namespace lutra {
namespace {

constexpr size_t kAlign = 64;
constexpr size_t kMaxFreeContexts = 8;
// Bytes of the free contexts for other shapes than the last run had: inputs of many sizes must not
// pile up memory.
constexpr size_t kMaxOtherBytes = size_t{1} << 28;
// No shape has more elements than this, so that numbers of bytes do not overflow.
constexpr int64_t kMaxElements = int64_t{1} << 40;
constexpr double kShortRun = 60e-6;  // seconds: not worth waking other threads for

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Block {
  size_t offset, bytes;
};

// The lowest offset where `bytes` fit between the live blocks (sorted by offset); adds the block.
size_t place(std::vector<Block>& live, size_t bytes) {
  size_t at = 0;
  auto next = live.begin();
  for (; next != live.end() && next->offset < at + bytes; ++next) {
    at = std::max(at, next->offset + next->bytes);
  }
  live.insert(std::upper_bound(live.begin(), live.end(), at,
                               [](size_t o, const Block& b) { return o < b.offset; }),
              {at, bytes});
  return at;
}

// Whether a value's storage order is that of a C-contiguous array.
bool is_row_major(const Shape& s) {
  const Dims a = storage_strides(s), b = row_major_strides(s);
  for (int i = 0; i < s.rank; ++i) {
    if (s[i] > 1 && a[i] != b[i]) return false;
  }
  return true;
}

// Kernels may read kSlack bytes past integers.
size_t stored_bytes(const Shape& s, bool quantized) {
  // Checked: the dims come from the caller.
  size_t n = quantized ? 1 : sizeof(float);
  for (int i = 0; i < s.rank; ++i) {
    const size_t d = static_cast<size_t>(s[i]);
    require(d == 0 || n <= std::numeric_limits<size_t>::max() / 8 / d,
            "the shape % is too large for memory", s);
    n *= d;
  }
  if (quantized) n += kSlack;
  return std::max(kAlign, (n + kAlign - 1) / kAlign * kAlign);
}

}  // namespace

int Plan::add_input(bool integers) {
  require(steps_.empty(), "inputs come before steps");
  values_.push_back({.integers = integers});
  return inputs_++;
}

int Plan::add_step(StepPtr step, std::vector<int> inputs) {
  const int id = static_cast<int>(values_.size());
  for (int i : inputs) {
    require(i >= 0 && i < id, "value % is made from value %, which does not exist yet", id, i);
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    const bool integers = values_[static_cast<size_t>(inputs[i])].integers;
    require(integers == step->reads_integers(i), "input % is %, and the step reads %", i,
            (integers ? "int32" : "float32"), (integers ? "float32" : "int32"));
  }
  values_.emplace_back();
  steps_.push_back({std::move(step), std::move(inputs), id, {}, label_});
  return id;
}

int Plan::quantized(int value, const Quantization& grid) {
  require(value >= 0 && value < static_cast<int>(values_.size()) && !is_quantized(value) &&
              !values_[static_cast<size_t>(value)].integers,
          "value % cannot be quantised", value);
  for (size_t i = 0; i < values_.size(); ++i) {
    if (values_[i].source == value && values_[i].grid == grid) return static_cast<int>(i);
  }
  values_.push_back({value, grid});
  return static_cast<int>(values_.size()) - 1;
}

void Plan::finish(std::vector<int> outputs) {
  for (int o : outputs) {
    require(o >= 0 && o < static_cast<int>(values_.size()) && !is_quantized(o),
            "output value % does not exist", o);
    require(!values_[static_cast<size_t>(o)].integers, "output value % is an input of int32", o);
  }
  outputs_ = std::move(outputs);
  fuse();
  resolve_quantized();
  for (const Value& v : values_) grids_.push_back(v.source >= 0 ? make_grid(v.grid) : Grid{});
}

void Plan::fuse() {
  std::vector<int> readers(values_.size(), 0);
  std::vector<size_t> maker(values_.size(), steps_.size());
  for (const int o : outputs_) ++readers[static_cast<size_t>(o)];
  for (const Value& v : values_) {
    if (v.source >= 0) ++readers[static_cast<size_t>(v.source)];
  }
  for (size_t s = 0; s < steps_.size(); ++s) {
    maker[static_cast<size_t>(steps_[s].out)] = s;
    for (const int i : steps_[s].inputs) ++readers[static_cast<size_t>(i)];
  }
  for (Entry& e : steps_) {
    const size_t from = static_cast<size_t>(e.inputs[0]);
    if (e.inputs.size() != 1 || readers[from] != 1 || maker[from] == steps_.size()) continue;
    Entry& before = steps_[maker[from]];
    if (!before.step->absorb(*e.step)) continue;
    before.out = e.out;
    before.label += " + " + e.label;
    maker[static_cast<size_t>(e.out)] = maker[from];
    e.step = nullptr;
  }
  std::erase_if(steps_, [](const Entry& e) { return !e.step; });
}

// Backwards, because a max pooling that moves to integers asks for integers of its own input.
void Plan::resolve_quantized() {
  std::vector<int> reads(values_.size(), 0);  // of each value as it is, by steps and as an output
  for (int o : outputs_) ++reads[static_cast<size_t>(o)];
  for (const Entry& e : steps_) {
    for (int i : e.inputs) ++reads[static_cast<size_t>(i)];
  }
  auto copies = [&](int value) {
    std::vector<int> found;
    for (size_t i = 0; i < values_.size(); ++i) {
      if (values_[i].source == value) found.push_back(static_cast<int>(i));
    }
    return found;
  };
  auto quantizer = [&](int value, int copy, const std::string& label) {
    return Entry{quantize_step(kernels_), {value}, -1, {copy}, label};
  };
  std::vector<Entry> reversed;
  for (size_t s = steps_.size(); s-- > 0;) {
    Entry& e = steps_[s];
    const std::vector<int> wanted = copies(e.out);
    const bool floats = reads[static_cast<size_t>(e.out)] > 0;
    StepPtr on_bytes = wanted.empty() || floats ? nullptr : e.step->on_bytes();
    if (on_bytes) {
      for (int copy : wanted) {
        const Quantization grid = values_[static_cast<size_t>(copy)].grid;
        reversed.push_back(
            {e.step->on_bytes(), {quantized(e.inputs[0], grid)}, -1, {copy}, e.label});
      }
      --reads[static_cast<size_t>(e.inputs[0])];  // it reads integers now
      reads.resize(values_.size(), 1);
      e.step = nullptr;
      continue;
    }
    const size_t fused = std::min(wanted.size(), static_cast<size_t>(e.step->max_quantized()));
    for (size_t i = fused; i < wanted.size(); ++i) {
      reversed.push_back(quantizer(e.out, wanted[i], e.label));
    }
    e.quantized.assign(wanted.begin(), wanted.begin() + static_cast<std::ptrdiff_t>(fused));
    if (!floats && fused > 0 && fused == wanted.size()) e.out = -1;
    std::vector<Quantization> grids;
    for (int id : e.quantized) grids.push_back(values_[static_cast<size_t>(id)].grid);
    e.step->set_outputs(grids, e.out >= 0);
    reversed.push_back(std::move(e));
  }
  for (int i = inputs_; i-- > 0;) {
    for (int copy : copies(i)) reversed.push_back(quantizer(i, copy, "input"));
  }
  steps_.assign(std::make_move_iterator(reversed.rbegin()),
                std::make_move_iterator(reversed.rend()));
}

Shapes Plan::input_shapes(const Entry& e, const Context& c) const {
  Shapes shapes;
  for (int i : e.inputs) shapes.push_back(c.shapes_[static_cast<size_t>(i)]);
  return shapes;
}

void Plan::check_memory(size_t bytes) const {
  if (bytes <= limit_) return;
  throw MemoryLimitError("a run takes more than the " + std::to_string(limit_) +
                         " bytes of working memory that it may take");
}

Shape Plan::infer(const Entry& e, const Shapes& inputs) const {
  try {
    const Shape shape = e.step->infer(inputs);
    bool sound = shape.size() <= kMaxElements;
    for (int i = 0; i < shape.rank; ++i) sound = sound && shape[i] >= 1;
    require(sound, "its output has the shape %, which is empty or too large", shape);
    return shape;
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(e.label + ": " + error.what());
  }
}

void Plan::lay_out(Context& c, const Shapes& input_shapes) const {
  require(input_shapes.size() == static_cast<size_t>(inputs_), "wrong number of inputs");
  std::vector<int> last_use(values_.size(), -1);
  for (size_t s = 0; s < steps_.size(); ++s) {
    for (int i : steps_[s].inputs) last_use[static_cast<size_t>(i)] = static_cast<int>(s);
  }
  for (int o : outputs_) last_use[static_cast<size_t>(o)] = std::numeric_limits<int>::max();

  c.input_shapes_.clear();
  c.shapes_ = input_shapes;
  c.shapes_.resize(values_.size());
  c.offsets_.assign(values_.size(), 0);
  c.outputs_ = outputs_;
  c.borrowed_.assign(values_.size(), nullptr);
  c.lent_.assign(values_.size(), false);
  std::vector<Block> live;
  std::vector<size_t> made;
  size_t top = 0, workspace = 0;
  auto allocate = [&](size_t id) {
    const bool input = id < static_cast<size_t>(inputs_);
    const auto times = std::count(outputs_.begin(), outputs_.end(), static_cast<int>(id));
    c.lent_[id] = is_row_major(c.shapes_[id]) && (input ? times == 0 : times == 1);
    if (c.lent_[id]) return;
    const size_t bytes = stored_bytes(c.shapes_[id], values_[id].source >= 0);
    c.offsets_[id] = place(live, bytes);
    top = std::max(top, c.offsets_[id] + bytes);
    check_memory(top);
    made.push_back(id);
  };
  for (size_t i = 0; i < static_cast<size_t>(inputs_); ++i) allocate(i);
  for (size_t s = 0; s < steps_.size(); ++s) {
    const Entry& e = steps_[s];
    const Shapes in = this->input_shapes(e, c);
    const Shape shape = infer(e, in);
    std::vector<int> outputs = e.quantized;
    if (e.out >= 0) outputs.push_back(e.out);
    for (int id : outputs) {
      c.shapes_[static_cast<size_t>(id)] = shape;
      allocate(static_cast<size_t>(id));
    }
    workspace = std::max(workspace, e.step->workspace(in, pool_.threads()));
    auto done = [&](size_t v) { return last_use[v] <= static_cast<int>(s); };
    for (size_t v : made) {  // values that nobody reads any more
      if (!done(v)) continue;
      std::erase_if(live, [&](const Block& b) { return b.offset == c.offsets_[v]; });
    }
    std::erase_if(made, done);
  }
  check_memory(top + workspace);
  c.workspace_ = top;
  c.arena_bytes_ = top + workspace;
  c.input_shapes_ = input_shapes;
}

size_t Plan::arena_bytes(const Shapes& input_shapes) const {
  Context context;
  lay_out(context, input_shapes);
  return context.arena_bytes_;
}

std::unique_ptr<Plan::Context> Plan::acquire(const Shapes& input_shapes) {
  std::unique_ptr<Context> context;
  {
    std::lock_guard lock(mutex_);
    auto found = std::find_if(free_.begin(), free_.end(),
                              [&](const auto& c) { return c->input_shapes_ == input_shapes; });
    if (found == free_.end() && free_.size() == kMaxFreeContexts) found = free_.begin();
    if (found != free_.end()) {
      context = std::move(*found);
      free_.erase(found);
    }
  }
  if (!context) context = std::make_unique<Context>();
  Context& c = *context;
  if (c.input_shapes_ != input_shapes) {
    lay_out(c, input_shapes);
    for (const Entry& e : steps_) e.step->prepare(this->input_shapes(e, c));
    if (c.capacity_ < c.arena_bytes_ || c.capacity_ / 2 > c.arena_bytes_) {
      c.memory_ = {};  // before the new one exists
      c.capacity_ = 0;
      c.memory_ = AlignedBytes::raw(c.arena_bytes_);
      c.capacity_ = c.arena_bytes_;
    }
  }
  return context;
}

void Plan::release(std::unique_ptr<Context> context) {
  std::vector<std::unique_ptr<Context>> dropped;  // outside the lock
  std::lock_guard lock(mutex_);
  const Shapes& last = context->input_shapes_;
  size_t others = 0;
  for (const auto& c : free_) {
    if (c->input_shapes_ != last) others += c->capacity_;
  }
  for (auto c = free_.begin(); c != free_.end();) {
    const bool other = (*c)->input_shapes_ != last;
    if (free_.size() == kMaxFreeContexts || (other && others > kMaxOtherBytes)) {
      if (other) others -= (*c)->capacity_;
      dropped.push_back(std::move(*c));
      c = free_.erase(c);
    } else {
      ++c;
    }
  }
  free_.push_back(std::move(context));
}

uint8_t* Plan::memory(Context& c, int id) const {
  if (c.lent_[static_cast<size_t>(id)]) {
    return reinterpret_cast<uint8_t*>(c.borrowed_[static_cast<size_t>(id)]);
  }
  return c.memory_.data() + c.offsets_[static_cast<size_t>(id)];
}

float* Plan::floats(Context& c, int id) const { return reinterpret_cast<float*>(memory(c, id)); }

void Plan::execute(Context& c, const std::vector<const float*>& inputs,
                   const std::vector<float*>& outputs, double* seconds, Cache* cache,
                   int64_t first) {
  const double start = now();
  double before = start;
  auto lap = [&](double* to) {
    const double t = now();
    *to = t - before;
    before = t;
  };
  const ThreadPool::Awake awake(pool_, c.last_run_ > kShortRun);
  for (size_t o = 0; o < outputs_.size(); ++o) {
    c.borrowed_[static_cast<size_t>(outputs_[o])] = outputs[o];
  }
  for (int i = 0; i < inputs_; ++i) {
    const Shape& s = c.shapes_[static_cast<size_t>(i)];
    if (c.lent_[static_cast<size_t>(i)]) {  // only read: an input is no output then
      c.borrowed_[static_cast<size_t>(i)] = const_cast<float*>(inputs[static_cast<size_t>(i)]);
      continue;
    }
    copy_strided(s, inputs[static_cast<size_t>(i)], row_major_strides(s), floats(c, i),
                 storage_strides(s));
  }
  if (seconds) lap(seconds++);
  for (size_t s = 0; s < steps_.size(); ++s) {
    const Entry& e = steps_[s];
    c.step_shapes_.clear();
    c.step_inputs_.clear();
    for (int i : e.inputs) {
      c.step_shapes_.push_back(c.shapes_[static_cast<size_t>(i)]);
      c.step_inputs_.push_back(is_quantized(i) ? nullptr : floats(c, i));
    }
    StepRun r{.shapes = c.step_shapes_,
              .inputs = c.step_inputs_,
              .bytes = is_quantized(e.inputs[0]) ? memory(c, e.inputs[0]) : nullptr,
              .out_shape = c.shapes_[static_cast<size_t>(e.made())],
              .out = e.out >= 0 ? floats(c, e.out) : nullptr,
              .quantized = static_cast<int>(e.quantized.size()),
              .q = {},
              .workspace = c.memory_.data() + c.workspace_,
              .pool = pool_,
              .past = cache ? cache->past(s) : nullptr,
              .first = first};
    for (size_t i = 0; i < e.quantized.size(); ++i) {
      r.q[i].grid = grids_[static_cast<size_t>(e.quantized[i])];
      r.q[i].data = memory(c, e.quantized[i]);
    }
    try {
      e.step->run(r);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(e.label + ": " + error.what());
    }
    if (seconds) lap(seconds++);
  }
  for (size_t o = 0; o < outputs_.size(); ++o) {
    const Shape& s = c.shapes_[static_cast<size_t>(outputs_[o])];
    if (c.lent_[static_cast<size_t>(outputs_[o])]) continue;
    copy_strided(s, floats(c, outputs_[o]), storage_strides(s), outputs[o], row_major_strides(s));
  }
  if (seconds) lap(seconds);
  c.last_run_ = now() - start;
}

std::unique_ptr<Cache> Plan::make_cache(int64_t sequences) const {
  std::vector<std::unique_ptr<Past>> pasts;
  for (const Entry& e : steps_) {
    PastShape shape = e.step->remembers();
    const bool any = !shape.arrays.empty();
    pasts.push_back(any ? std::make_unique<Past>(std::move(shape), sequences) : nullptr);
  }
  return std::make_unique<Cache>(this, std::move(pasts), sequences);
}

std::vector<Plan::StepInfo> Plan::describe(const Context& c) const {
  std::vector<StepInfo> all;
  for (const Entry& e : steps_) {
    const Shapes in = input_shapes(e, c);
    size_t bytes = e.step->parameter_bytes();
    auto add = [&](int id) {
      const size_t size = static_cast<size_t>(c.shapes_[static_cast<size_t>(id)].size());
      bytes += size * (is_quantized(id) ? 1 : sizeof(float));
    };
    for (int i : e.inputs) add(i);
    for (int q : e.quantized) add(q);
    if (e.out >= 0) add(e.out);
    all.push_back({e.label, e.step->method(in), bytes});
  }
  return all;
}

}  // namespace lutra
