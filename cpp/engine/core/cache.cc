#include "engine/core/cache.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "engine/core/step.h"

namespace lutra {

namespace {
constexpr int64_t kFirstTokens = 64;
}

Past::Past(PastShape shape, int64_t sequences)
    : filled(static_cast<size_t>(sequences), 0),
      shape_(std::move(shape)),
      memory_(shape_.arrays.size()) {}

size_t Past::per_sequence(size_t array, int64_t capacity) const {
  const PastArray& a = shape_.arrays[array];
  return static_cast<size_t>(a.outer * capacity * a.inner);
}

size_t Past::bytes() const {
  size_t floats = 0;
  for (size_t i = 0; i < memory_.size(); ++i) floats += per_sequence(i, capacity_) * filled.size();
  return floats * sizeof(float);
}

float* Past::data(size_t array, int64_t sequence) {
  return reinterpret_cast<float*>(memory_[array].data()) +
         per_sequence(array, capacity_) * static_cast<size_t>(sequence);
}

void Past::reserve(int64_t tokens) {
  if (tokens <= capacity_) return;
  std::vector<int64_t> rows(filled.size());
  std::iota(rows.begin(), rows.end(), 0);
  move(rows, std::min(most(), std::max({tokens, 2 * capacity_, kFirstTokens})));
}

void Past::select(const std::vector<int64_t>& rows) {
  move(rows, capacity_);
  std::vector<int64_t> counts;
  for (const int64_t row : rows) counts.push_back(filled[static_cast<size_t>(row)]);
  filled = std::move(counts);
}

void Past::move(const std::vector<int64_t>& rows, int64_t capacity) {
  std::vector<AlignedBytes> moved;
  for (size_t i = 0; i < memory_.size(); ++i) {
    const size_t size = per_sequence(i, capacity);
    AlignedBytes memory = AlignedBytes::raw(size * rows.size() * sizeof(float));
    const PastArray& a = shape_.arrays[i];
    for (size_t r = 0; r < rows.size() && capacity_ > 0; ++r) {
      const float* const from = data(i, rows[r]);
      float* const to = reinterpret_cast<float*>(memory.data()) + r * size;
      const int64_t used = filled[static_cast<size_t>(rows[r])] * a.inner;
      for (int64_t o = 0; o < a.outer; ++o) {
        std::copy_n(from + o * capacity_ * a.inner, used, to + o * capacity * a.inner);
      }
    }
    moved.push_back(std::move(memory));
  }
  memory_ = std::move(moved);
  capacity_ = capacity;
}

Cache::Use::Use(Cache& cache) : cache_(cache) {
  require(!cache.used_.exchange(true), "the cache is in use by another run; give each its own");
}

size_t Cache::bytes() const {
  size_t all = 0;
  for (const auto& past : pasts_) all += past ? past->bytes() : 0;
  return all;
}

void Cache::select(const std::vector<int64_t>& rows) {
  for (const int64_t row : rows) {
    require(row >= 0 && row < sequences_, "there is no sequence %; the cache holds %", row,
            sequences_);
  }
  const Use use(*this);
  for (const auto& past : pasts_) {
    if (past) past->select(rows);
  }
  sequences_ = static_cast<int64_t>(rows.size());
}

}  // namespace lutra
