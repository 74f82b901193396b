// 64-byte aligned bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace lutra {

inline size_t align64(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Moved but never copied: a copy would begin at another offset.
class AlignedBytes {
 public:
  AlignedBytes() = default;
  AlignedBytes(AlignedBytes&&) = default;
  AlignedBytes& operator=(AlignedBytes&&) = default;
  explicit AlignedBytes(size_t size) : storage_(size + 64) {}
  bool empty() const { return storage_.empty(); }
  uint8_t* data() {
    const uintptr_t p = reinterpret_cast<uintptr_t>(storage_.data());
    return storage_.data() + ((64 - p % 64) % 64);
  }
  const uint8_t* data() const { return const_cast<AlignedBytes*>(this)->data(); }

 private:
  std::vector<uint8_t> storage_;
};

}  // namespace lutra
