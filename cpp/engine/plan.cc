#include "plan.h"

#include <algorithm>
#include <limits>
#include <string>

namespace lutra {
namespace {

constexpr size_t kAlign = 64;
constexpr size_t kMaxFreeContexts = 8;

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

size_t padded_bytes(const Shape& s) {
  // Checked: the dims come from the caller.
  size_t n = sizeof(float);
  for (int i = 0; i < s.rank; ++i) {
    const size_t d = static_cast<size_t>(s[i]);
    require(d == 0 || n <= std::numeric_limits<size_t>::max() / 8 / d,
            "the shape " + s.text() + " is too large for memory");
    n *= d;
  }
  return std::max(kAlign, (n + kAlign - 1) / kAlign * kAlign);
}

}  // namespace

int Plan::add_input() {
  require(steps_.empty(), "inputs come before steps");
  return inputs_++;
}

int Plan::add_step(StepPtr step, std::vector<int> inputs) {
  const int id = inputs_ + static_cast<int>(steps_.size());
  for (int i : inputs) {
    require(i >= 0 && i < id, "step " + std::to_string(id) + " reads value " + std::to_string(i) +
                                  ", which does not exist yet");
  }
  steps_.push_back({std::move(step), std::move(inputs)});
  return id;
}

void Plan::set_outputs(std::vector<int> outputs) {
  for (int i : outputs) {
    require(i >= 0 && i < inputs_ + static_cast<int>(steps_.size()),
            "output value " + std::to_string(i) + " does not exist");
  }
  outputs_ = std::move(outputs);
}

void Plan::prepare(Context& c, const std::vector<Shape>& input_shapes) const {
  require(input_shapes.size() == static_cast<size_t>(inputs_), "wrong number of inputs");
  const size_t values = static_cast<size_t>(inputs_) + steps_.size();
  std::vector<int> last_use(values, -1);
  for (size_t s = 0; s < steps_.size(); ++s) {
    for (int i : steps_[s].inputs) last_use[static_cast<size_t>(i)] = static_cast<int>(s);
  }
  for (int o : outputs_) last_use[static_cast<size_t>(o)] = std::numeric_limits<int>::max();

  c.input_shapes_.clear();
  c.shapes_ = input_shapes;
  c.shapes_.resize(values);
  c.offsets_.assign(values, 0);
  c.outputs_ = outputs_;
  std::vector<Block> live;
  size_t top = 0, workspace = 0;
  auto allocate = [&](size_t id) {
    const size_t bytes = padded_bytes(c.shapes_[id]);
    c.offsets_[id] = place(live, bytes);
    top = std::max(top, c.offsets_[id] + bytes);
  };
  for (size_t i = 0; i < static_cast<size_t>(inputs_); ++i) allocate(i);
  for (size_t s = 0; s < steps_.size(); ++s) {
    const size_t id = static_cast<size_t>(inputs_) + s;
    std::vector<Shape> in;
    for (int i : steps_[s].inputs) in.push_back(c.shapes_[static_cast<size_t>(i)]);
    c.shapes_[id] = steps_[s].step->infer(in);
    allocate(id);
    workspace = std::max(workspace, steps_[s].step->workspace(in, pool_.threads()));
    std::erase_if(live, [&](const Block& b) {  // values that nobody reads any more
      for (size_t v = 0; v <= id; ++v) {
        if (c.offsets_[v] == b.offset && last_use[v] > static_cast<int>(s)) return false;
      }
      return true;
    });
  }
  c.workspace_ = top;
  c.arena_bytes_ = top + workspace;
  c.memory_ = AlignedBytes(c.arena_bytes_);
  c.input_shapes_ = input_shapes;
}

std::unique_ptr<Plan::Context> Plan::acquire(const std::vector<Shape>& input_shapes) {
  std::unique_ptr<Context> context;
  {
    std::lock_guard lock(mutex_);
    auto same = std::find_if(free_.begin(), free_.end(),
                             [&](const auto& c) { return c->input_shapes_ == input_shapes; });
    if (same == free_.end() && !free_.empty()) same = free_.end() - 1;
    if (same != free_.end()) {
      context = std::move(*same);
      free_.erase(same);
    }
  }
  if (!context) context = std::make_unique<Context>();
  if (context->input_shapes_ != input_shapes) prepare(*context, input_shapes);
  return context;
}

void Plan::release(std::unique_ptr<Context> context) {
  std::lock_guard lock(mutex_);
  if (free_.size() < kMaxFreeContexts) free_.push_back(std::move(context));
}

float* Plan::value(Context& c, int id) const {
  return reinterpret_cast<float*>(c.memory_.data() + c.offsets_[static_cast<size_t>(id)]);
}

void Plan::execute(Context& c, const std::vector<const float*>& inputs,
                   const std::vector<float*>& outputs) {
  for (int i = 0; i < inputs_; ++i) {
    const Shape& s = c.shapes_[static_cast<size_t>(i)];
    copy_strided(s, inputs[static_cast<size_t>(i)], row_major_strides(s), value(c, i),
                 storage_strides(s));
  }
  for (size_t s = 0; s < steps_.size(); ++s) {
    const int id = inputs_ + static_cast<int>(s);
    c.step_shapes_.clear();
    c.step_inputs_.clear();
    for (int i : steps_[s].inputs) {
      c.step_shapes_.push_back(c.shapes_[static_cast<size_t>(i)]);
      c.step_inputs_.push_back(value(c, i));
    }
    steps_[s].step->run(c.step_shapes_, c.step_inputs_, c.shapes_[static_cast<size_t>(id)],
                        value(c, id), c.memory_.data() + c.workspace_, pool_);
  }
  for (size_t o = 0; o < outputs_.size(); ++o) {
    const Shape& s = c.shapes_[static_cast<size_t>(outputs_[o])];
    copy_strided(s, value(c, outputs_[o]), storage_strides(s), outputs[o], row_major_strides(s));
  }
}

}  // namespace lutra
