#include <array>

#include "c/byte_reader.h"

namespace lutra {
namespace {

constexpr size_t kBytes = 8;  // that one step takes

using Tables = std::array<std::array<uint32_t, 256>, kBytes>;

// tables[k][b]: what byte b becomes when k more bytes follow it.
Tables make_tables() {
  Tables tables{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t value = b;
    for (int i = 0; i < 8; ++i) value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0u);
    tables[0][b] = value;
  }
  for (size_t k = 1; k < kBytes; ++k) {
    for (size_t b = 0; b < 256; ++b) {
      const uint32_t before = tables[k - 1][b];
      tables[k][b] = before >> 8 ^ tables[0][before & 255];
    }
  }
  return tables;
}

}  // namespace

uint32_t crc32(const uint8_t* data, size_t size) {
  static const Tables tables = make_tables();  // 8 KB that no file has to hold
  uint32_t crc = ~0u;
  for (; size >= kBytes; data += kBytes, size -= kBytes) {
    uint32_t next = 0;
    for (size_t i = 0; i < kBytes; ++i) {
      const uint32_t byte = i < 4 ? (crc >> 8 * i & 255) ^ data[i] : data[i];
      next ^= tables[kBytes - 1 - i][byte];
    }
    crc = next;
  }
  for (; size > 0; ++data, --size) crc = crc >> 8 ^ tables[0][(crc ^ *data) & 255];
  return ~crc;
}

}  // namespace lutra
