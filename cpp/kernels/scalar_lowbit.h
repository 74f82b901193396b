// Low-bit weights: what the kernels compute. Private to scalar.cc and wasm.cc.
#pragma once

#include <cmath>
#include <limits>

#include "kernels.h"

namespace lutra {
namespace {

float lowbit_quantize(const float* x, size_t n, int8_t* q) {
  float most = 0.0f;
  bool finite = true;
  for (size_t i = 0; i < n; ++i) {
    finite = finite && std::isfinite(x[i]);
    most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
  }
  if (!finite) {
    for (size_t i = 0; i < n; ++i) q[i] = 0;
    return std::numeric_limits<float>::quiet_NaN();
  }
  const bool zero = most < 0x1p-120f;
  const float inverse = zero ? 0.0f : 127.0f / most;
  for (size_t i = 0; i < n; ++i) {
    q[i] = static_cast<int8_t>(static_cast<int32_t>(std::nearbyintf(x[i] * inverse)));
  }
  return zero ? 0.0f : most / 127.0f;
}

// Packed weights are the codes: one byte each, (outputs, depth).
size_t lowbit_dense_bytes(const LowBitShape& s) {
  return static_cast<size_t>(s.outputs) * static_cast<size_t>(s.depth);
}

void pack_lowbit_dense(const LowBitShape& s, const uint8_t* codes, uint8_t* packed) {
  for (size_t i = 0; i < lowbit_dense_bytes(s); ++i) packed[i] = codes[i];
}

void lowbit_dense(const LowBitShape& s, const uint8_t* packed, int32_t group, const int8_t* x,
                  int32_t width, int32_t rows, int32_t first, int32_t last, int32_t* sums,
                  size_t stride) {
  for (int32_t r = 0; r < rows; ++r) {
    for (int32_t m = first; m < last; ++m) {
      const uint8_t* const u =
          packed + static_cast<size_t>(m) * s.depth + static_cast<size_t>(group) * s.group;
      int32_t sum = 0;
      for (int32_t k = 0; k < s.group; ++k) {
        sum += u[k] * x[(static_cast<size_t>(k / 4) * width + r) * 4 + k % 4];
      }
      sums[r * stride + (m - first)] = sum;
    }
  }
}

size_t lowbit_table_bytes(const LowBitShape& s) { return lowbit_dense_bytes(s); }

void pack_lowbit_tables(const LowBitShape& s, const uint8_t* codes, uint8_t* packed) {
  pack_lowbit_dense(s, codes, packed);
}

int32_t lowbit_table_depth(const LowBitShape& s) { return s.group; }

size_t lowbit_scratch_bytes(const LowBitShape&, int32_t) { return 0; }

void lowbit_tables(const LowBitShape& s, const uint8_t* packed, int32_t group, const int8_t* x,
                   int32_t rows, int32_t first, int32_t last, int32_t* sums, size_t stride,
                   uint8_t*) {
  const int32_t middle = s.levels == 3 ? 1 : s.levels / 2;
  for (int32_t r = 0; r < rows; ++r) {
    for (int32_t m = first; m < last; ++m) {
      const uint8_t* const u =
          packed + static_cast<size_t>(m) * s.depth + static_cast<size_t>(group) * s.group;
      int32_t sum = 0;
      for (int32_t k = 0; k < s.group; ++k) {
        sum += (u[k] - middle) * x[static_cast<size_t>(k) * kTableRows + r];
      }
      sums[r * stride + (m - first)] = sum;
    }
  }
}

size_t lowbit_register_bytes(const LowBitShape& s) { return lowbit_dense_bytes(s); }

void pack_lowbit_registers(const LowBitShape& s, const uint8_t* codes, uint8_t* packed) {
  pack_lowbit_dense(s, codes, packed);
}

size_t lowbit_register_scratch_bytes(const LowBitShape&, int32_t) { return 0; }

void lowbit_registers(const LowBitShape& s, const uint8_t* packed, int32_t group, const int8_t* x,
                      int32_t rows, int32_t first, int32_t last, int32_t* sums, size_t stride,
                      uint8_t*) {
  const size_t padded = static_cast<size_t>((s.group + 31) / 32 * 32);
  for (int32_t r = 0; r < rows; ++r) {
    for (int32_t m = first; m < last; ++m) {
      const uint8_t* const u =
          packed + static_cast<size_t>(m) * s.depth + static_cast<size_t>(group) * s.group;
      int32_t sum = 0;
      for (int32_t k = 0; k < s.group; ++k) sum += u[k] * x[r * padded + k];
      sums[r * stride + (m - first)] = sum;
    }
  }
}

void lowbit_finish(const LowBitFinish& f, int32_t rows, int32_t outputs, const int32_t* sums,
                   size_t sums_stride, float* out, size_t out_stride) {
  for (int32_t r = 0; r < rows; ++r) {
    for (int32_t m = 0; m < outputs; ++m) {
      const int32_t plus = f.zero ? f.plus - f.zero[m] : f.plus;
      // Unsigned, because the parts of a sum that fits may be larger than int32.
      const uint32_t d =
          static_cast<uint32_t>(f.times) * static_cast<uint32_t>(sums[r * sums_stride + m]) +
          static_cast<uint32_t>(plus) * static_cast<uint32_t>(f.x_sum[r]);
      float y = static_cast<float>(static_cast<int32_t>(d)) * f.scale[m];
      if (!f.first) y = out[r * out_stride + m] + y;
      if (f.row_scale) y = y * f.row_scale[r];
      out[r * out_stride + m] = y;
    }
  }
}

}  // namespace
}  // namespace lutra
