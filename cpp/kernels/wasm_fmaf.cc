// fmaf() for WebAssembly, in place of the C library's, which asks for another rounding mode where
// a sum is halfway between two floats; there is none, and its last bit is then wrong.
#include <cstdint>

extern "C" float fmaf(float x, float y, float z) {
  const double product = static_cast<double>(x) * static_cast<double>(y);  // exact
  const double sum = product + static_cast<double>(z);
  // What rounding took from the sum (exact for finite numbers: Knuth's two-sum).
  const double part = sum - product;
  const double error = (product - (sum - part)) + (static_cast<double>(z) - part);
  uint64_t bits = __builtin_bit_cast(uint64_t, sum);
  // An inexact sum becomes the neighbour with an odd last bit (Boldo, Melquiond 2008): it has more
  // bits than two floats need, and so rounds to a float as the exact sum does. NaN compares false.
  if ((error > 0.0 || error < 0.0) && (bits & 1) == 0 && sum - sum == 0.0) {
    bits += (error > 0.0) == (sum > 0.0) ? 1u : ~uint64_t{0};
  }
  return static_cast<float>(__builtin_bit_cast(double, bits));
}
