// Memory for the outputs of a plan. A caller owns its output arrays; when it drops one, the memory
// comes back for a later run, because fresh pages of a large array cost as much as a fast network.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

namespace lutra {

class OutputPool {
 public:
  struct Buffer {
    std::unique_ptr<float[]> data;
    size_t size = 0;  // floats
  };

  OutputPool() { free_.reserve(kKept); }  // so that give_back() cannot fail

  Buffer take(size_t size) {
    std::lock_guard lock(mutex_);
    for (Buffer& b : free_) {
      if (b.size != size) continue;
      Buffer taken = std::move(b);
      b = std::move(free_.back());
      free_.pop_back();
      return taken;
    }
    return {std::unique_ptr<float[]>(new float[size]), size};
  }

  void give_back(Buffer buffer) {
    std::lock_guard lock(mutex_);
    if (buffer.size <= kLargest && free_.size() < kKept) free_.push_back(std::move(buffer));
  }

 private:
  static constexpr size_t kKept = 4, kLargest = size_t{1} << 22;  // 16 MB
  std::mutex mutex_;
  std::vector<Buffer> free_;
};

}  // namespace lutra
