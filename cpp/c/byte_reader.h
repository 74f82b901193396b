// Reads little-endian bytes of strangers: nothing is read that is not there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "engine/core/step_args.h"

namespace lutra {

class ByteReader {
 public:
  ByteReader(const uint8_t* data, size_t size) : at_(data), left_(size) {}

  size_t left() const { return left_; }

  // The next bytes. Throws std::invalid_argument if there are not so many.
  const uint8_t* take(size_t size) {
    require(size <= left_, "it ends in the middle of its description");
    const uint8_t* const taken = at_;
    at_ += size;
    left_ -= size;
    return taken;
  }

  uint8_t byte() { return *take(1); }
  uint32_t u32() { return static_cast<uint32_t>(word(4)); }
  uint64_t u64() { return word(8); }
  float f32() {
    const uint32_t bits = u32();
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  double f64() {
    const uint64_t bits = u64();
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  // The number of entries of a list, each of at least `least` bytes.
  uint32_t count(size_t least) {
    const uint32_t n = u32();
    require(n <= left_ / least, "a list of % entries is longer than it is", n);
    return n;
  }
  std::string text() {
    const uint32_t size = count(1);
    const auto* const letters = reinterpret_cast<const char*>(take(size));
    return {letters, size};
  }
  // A whole number of 64 bits whose value has 32: no model needs a larger one, and a sum or a
  // product of two of them does not overflow.
  int64_t integer() {
    const int64_t value = static_cast<int64_t>(u64());
    require(value >= INT32_MIN && value <= INT32_MAX, "the number % is out of range", value);
    return value;
  }
  Sizes sizes() {
    Sizes all(count(8));
    for (int64_t& size : all) size = integer();
    return all;
  }

 private:
  uint64_t word(int bytes) {
    const uint8_t* const from = take(static_cast<size_t>(bytes));
    uint64_t value = 0;
    for (int i = bytes; i-- > 0;) value = value << 8 | from[i];
    return value;
  }

  const uint8_t* at_;
  size_t left_;
};

// CRC-32 as zlib computes it.
uint32_t crc32(const uint8_t* data, size_t size);

}  // namespace lutra
