// The limits of the engine, in one place: the checks read them, and _engine.limits().
#pragma once

#include <cstdint>

namespace lutra {

// Largest kernel, stride, dilation or padding of a window.
inline constexpr int64_t kMaxExtent = 4096;
// Largest factor by which images grow.
inline constexpr int64_t kMaxFactor = 64;
// Bits of an activation grid: sums of two products with int8 fit int16.
inline constexpr int32_t kMaxActBits = 7;
// Entries of response tables, and weights of int8 layers, are in -kInt8Max..kInt8Max.
inline constexpr int32_t kInt8Max = 127;

inline constexpr int64_t kCentroidCounts[] = {8, 16, 32, 64};
inline constexpr int32_t kMaxSubvector = 64;
// Sums of so many table entries are exact in int32 and in float32.
inline constexpr int32_t kMaxCodebooks = (1 << 24) / 128;

inline constexpr int32_t kMinLookupActBits = 2, kMaxLookupActBits = 6;
// Columns of a response table; their number is odd.
inline constexpr int64_t kMinWeights = 3, kMaxWeights = 33;
inline constexpr int64_t kWeightBits[] = {2, 4, 8};  // of a packed weight index
// So many entries of a response table, or products of int8 weights and activations, have exact sums
// in int32.
inline constexpr int64_t kMaxLookupDepth = INT32_MAX / kInt8Max;
inline constexpr int64_t kMaxInt8Depth = (int64_t{1} << 31) / (127 * 128);

// Codes of low-bit weights: of 1 bit, ternary, of 2, 3 and 4 bits. Sums of so many products of
// twice the distance of a code from a zero point (at most 30) and an int8 are exact in int32.
inline constexpr int64_t kLowBitLevels[] = {2, 3, 4, 8, 16};
inline constexpr int64_t kMaxLowBitDepth = INT32_MAX / (30 * 128);
inline constexpr int64_t kMaxLowBitOutputs = 1 << 24;

inline constexpr int64_t kFunctionEntries[] = {8, 16, 32};  // lines of a function table

template <int64_t kCount>
constexpr bool is_one_of(int64_t value, const int64_t (&list)[kCount]) {
  for (const int64_t entry : list) {
    if (entry == value) return true;
  }
  return false;
}

}  // namespace lutra
