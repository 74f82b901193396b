// What steps remember of sequences from one run to the next.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "engine/core/memory.h"

namespace lutra {

// Floats that a step keeps for every token of a sequence: (outer, tokens, inner).
struct PastArray {
  int64_t outer, inner;
};
// All that it keeps, and of how many tokens at most; no arrays: it remembers nothing.
struct PastShape {
  std::vector<PastArray> arrays;
  int64_t most = 0;
};

// What one step remembers of some sequences. It has room for `capacity` tokens of each, and takes
// more when it needs it.
class Past {
 public:
  Past(PastShape shape, int64_t sequences);

  int64_t sequences() const { return static_cast<int64_t>(filled.size()); }
  int64_t capacity() const { return capacity_; }
  int64_t most() const { return shape_.most; }
  size_t bytes() const;
  // (outer, capacity, inner) of a sequence
  float* data(size_t array, int64_t sequence);
  // Makes room for so many tokens, at most `most`.
  void reserve(int64_t tokens);
  // Sequence i becomes what sequence rows[i] is.
  void select(const std::vector<int64_t>& rows);

  std::vector<int64_t> filled;  // tokens of each sequence

 private:
  size_t per_sequence(size_t array, int64_t capacity) const;
  // Copies what is there to memory for other sequences, or more tokens.
  void move(const std::vector<int64_t>& rows, int64_t capacity);

  PastShape shape_;
  int64_t capacity_ = 0;
  std::vector<AlignedBytes> memory_;
};

// What a plan remembers: for each step its past, null where it has none. For one run at a time.
class Cache {
 public:
  Cache(const void* plan, std::vector<std::unique_ptr<Past>> pasts, int64_t sequences)
      : plan_(plan), pasts_(std::move(pasts)), sequences_(sequences) {}

  // Throws std::invalid_argument while another run uses it.
  class Use {
   public:
    explicit Use(Cache& cache);
    ~Use() { cache_.used_ = false; }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    Cache& cache_;
  };

  const void* plan() const { return plan_; }  // that it is of
  int64_t sequences() const { return sequences_; }
  Past* past(size_t step) { return pasts_[step].get(); }
  size_t bytes() const;
  // Sequence i becomes what sequence rows[i] is.
  void select(const std::vector<int64_t>& rows);

 private:
  const void* plan_;
  std::vector<std::unique_ptr<Past>> pasts_;
  int64_t sequences_;
  std::atomic<bool> used_ = false;
};

}  // namespace lutra
