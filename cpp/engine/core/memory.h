// 64-byte aligned bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace lutra {

inline size_t align64(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Moved but never copied: a copy would begin at another offset.
class AlignedBytes {
 public:
  AlignedBytes() = default;
  explicit AlignedBytes(size_t size) : storage_(new uint8_t[size + 64]()) {}  // zeros
  // With any content. Pages of a large block are not touched before they are used.
  static AlignedBytes raw(size_t size) {
    AlignedBytes bytes;
    bytes.storage_.reset(new uint8_t[size + 64]);
    return bytes;
  }
  bool empty() const { return !storage_; }
  uint8_t* data() {
    const uintptr_t p = reinterpret_cast<uintptr_t>(storage_.get());
    return storage_.get() + ((64 - p % 64) % 64);
  }
  const uint8_t* data() const { return const_cast<AlignedBytes*>(this)->data(); }

 private:
  std::unique_ptr<uint8_t[]> storage_;
};

}  // namespace lutra
