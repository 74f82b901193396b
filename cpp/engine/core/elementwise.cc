#include "engine/core/elementwise.h"

#include <array>
#include <cmath>
#include <utility>

namespace lutra {
namespace {

// A simple function whose numbers may differ between channels.
struct ChannelBend {
  BendKind kind;
  std::vector<float> a, b;  // one, or one for each channel

  Bend at(int64_t channel) const {
    const size_t c = a.size() == 1 ? 0 : static_cast<size_t>(channel) % a.size();
    return {kind, a[c], b[c]};
  }
};

class Bends : public Elementwise {
 public:
  static constexpr size_t kMost = 16;  // at a time

  Bends(const Kernels& kernels, std::vector<ChannelBend> bends)
      : kernels_(kernels), bends_(std::move(bends)) {
    for (const ChannelBend& b : bends_) {
      if (b.a.size() > 1) channels_ = static_cast<int64_t>(b.a.size());
    }
  }
  int64_t channels() const override { return channels_; }

  void apply(const float* x, size_t n, const Channels& c, float* y) const override {
    const int64_t count = static_cast<int64_t>(n);
    if (channels_ == 0) return channel(0, x, count, y);
    if (c.step == 1) return places(x, count, c.first, y);
    int64_t at = c.first, offset = c.offset;
    for (int64_t i = 0; i < count; offset = 0) {
      const int64_t some = std::min(count - i, c.step - offset);
      channel(at, x + i, some, y + i);
      i += some;
      if (++at == c.count) at = 0;
    }
  }

  bool extend(int64_t channel, Line& line) const override {
    for (const ChannelBend& bend : bends_) {
      if (bend.kind == BendKind::kLimits) continue;
      if (bend.kind != BendKind::kLine) return false;
      const Bend one = bend.at(channel);
      line.scale *= static_cast<double>(one.a);
      line.shift = line.shift * static_cast<double>(one.a) + static_cast<double>(one.b);
      const double offset = std::abs(line.shift / line.scale);
      line.offset = line.offset > offset ? line.offset : offset;  // NaN stays
      ++line.functions;
    }
    return true;
  }

  // Both in one pass; null if they are too many.
  static ElementwisePtr joined(const Bends& first, const Bends& next) {
    if (first.bends_.size() + next.bends_.size() > kMost) return nullptr;
    std::vector<ChannelBend> all = first.bends_;
    all.insert(all.end(), next.bends_.begin(), next.bends_.end());
    return std::make_shared<Bends>(first.kernels_, std::move(all));
  }

 private:
  void channel(int64_t channel, const float* x, int64_t n, float* y) const {
    std::array<Bend, kMost> bends;
    for (size_t i = 0; i < bends_.size(); ++i) bends[i] = bends_[i].at(channel);
    kernels_.bend(bends.data(), static_cast<int32_t>(bends_.size()), x, static_cast<size_t>(n), y);
  }

  // The channels of one place after the other.
  void places(const float* x, int64_t n, int64_t first, float* y) const {
    for (const ChannelBend& bend : bends_) {
      if (bend.a.size() == 1) {
        const Bend one = bend.at(0);
        kernels_.bend(&one, 1, x, static_cast<size_t>(n), y);
      } else {  // only lines have numbers for each channel
        const int64_t size = static_cast<int64_t>(bend.a.size());
        for (int64_t i = 0, c = first % size; i < n; c = 0) {
          const int64_t some = std::min(n - i, size - c);
          const float *const a = bend.a.data() + c, *const b = bend.b.data() + c;
          in_chunks(x + i, static_cast<size_t>(some), y + i,
                    [=](float v, size_t k) { return v * a[k] + b[k]; });
          i += some;
        }
      }
      x = y;
    }
  }

  const Kernels& kernels_;
  std::vector<ChannelBend> bends_;
  int64_t channels_ = 0;
};

class InOrder : public Elementwise {
 public:
  explicit InOrder(std::vector<ElementwisePtr> parts) : parts_(std::move(parts)) {}
  int64_t channels() const override {
    int64_t most = 0;
    for (const ElementwisePtr& part : parts_) most = std::max(most, part->channels());
    return most;
  }
  void apply(const float* x, size_t n, const Channels& channels, float* y) const override {
    for (const ElementwisePtr& part : parts_) {
      part->apply(x, n, channels, y);
      x = y;
    }
  }
  bool extend(int64_t channel, Line& line) const override {
    return std::all_of(parts_.begin(), parts_.end(),
                       [&](const ElementwisePtr& part) { return part->extend(channel, line); });
  }
  const std::vector<ElementwisePtr>& parts() const { return parts_; }

 private:
  std::vector<ElementwisePtr> parts_;
};

std::vector<ElementwisePtr> parts_of(ElementwisePtr function) {
  if (const auto* all = dynamic_cast<const InOrder*>(function.get())) return all->parts();
  return {std::move(function)};
}

ElementwisePtr bend(const Kernels& kernels, BendKind kind, std::vector<float> a,
                    std::vector<float> b) {
  return std::make_shared<Bends>(kernels,
                                 std::vector<ChannelBend>{{kind, std::move(a), std::move(b)}});
}

}  // namespace

ElementwisePtr in_order(ElementwisePtr first, ElementwisePtr next) {
  if (!first) return next;
  std::vector<ElementwisePtr> parts = parts_of(std::move(first));
  for (ElementwisePtr& part : parts_of(std::move(next))) {
    const auto* before = dynamic_cast<const Bends*>(parts.back().get());
    const auto* now = dynamic_cast<const Bends*>(part.get());
    ElementwisePtr both = before && now ? Bends::joined(*before, *now) : nullptr;
    if (both) {
      parts.back() = std::move(both);
    } else {
      parts.push_back(std::move(part));
    }
  }
  if (parts.size() == 1) return parts[0];
  return std::make_shared<InOrder>(std::move(parts));
}

ElementwisePtr limits(const Kernels& kernels, float low, float high) {
  return bend(kernels, BendKind::kLimits, {low}, {high});
}

ElementwisePtr affine(const Kernels& kernels, std::vector<float> scale, std::vector<float> bias) {
  require(!scale.empty() && scale.size() == bias.size(), "scale and bias differ in length");
  return bend(kernels, BendKind::kLine, std::move(scale), std::move(bias));
}

ElementwisePtr hardswish(const Kernels& kernels) {
  return bend(kernels, BendKind::kHardswish, {0.0f}, {0.0f});
}

ElementwisePtr leaky_relu(const Kernels& kernels, float slope) {
  return bend(kernels, BendKind::kLeaky, {slope}, {0.0f});
}

}  // namespace lutra
