// The part of kernels_test.cc about low-bit weights.
#pragma once

#include "kernel_cases.h"

namespace lutra {
namespace {

// One group of a matrix, by both kernels, then what becomes of the sums.
void test_lowbit(const Kernels& k, const LowBitShape& s, int32_t rows, int fill) {
  begin("low-bit weights, depth %d, outputs %d, levels %d, group %d, rows %d, fill %d", s.depth,
        s.outputs, s.levels, s.group, rows, fill);
  Guarded<uint8_t> codes(static_cast<size_t>(s.outputs) * s.depth, coin());
  for (size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<uint8_t>(fill == 0   ? pick(0, s.levels - 1)
                                    : fill == 1 ? 0
                                                : s.levels - 1);
  }
  std::vector<int8_t> x(static_cast<size_t>(rows) * s.group);
  for (int8_t& v : x) v = static_cast<int8_t>(fill == 0 ? pick(-128, 127) : coin() ? -128 : 127);
  if (fill != 0) std::fill(x.begin(), x.end(), static_cast<int8_t>(coin() ? -128 : 127));
  const int32_t group = pick(0, s.depth / s.group - 1), middle = s.levels == 3 ? 1 : s.levels / 2;
  const size_t stride = static_cast<size_t>(s.outputs + pick(0, 3));

  for (const char* const name : {"dense", "tables", "registers"}) {
    const bool tables = name[0] == 't', registers = name[0] == 'r';
    const auto bytes = tables      ? k.lowbit_table_bytes
                       : registers ? k.lowbit_register_bytes
                                   : k.lowbit_dense_bytes;
    const auto pack = tables      ? k.pack_lowbit_tables
                      : registers ? k.pack_lowbit_registers
                                  : k.pack_lowbit_dense;
    if (registers && rows > kRegisterRows) continue;
    Canvas<uint8_t> packed(bytes(s));
    pack(s, codes.data(), packed.data());
    check(packed.intact(), "packing wrote outside its memory");
    const Exact weights(packed);
    int32_t width = kTableRows, depth = k.lowbit_table_depth(s);
    if (registers) {
      width = rows;
      depth = (s.group + 31) / 32 * 32;
    } else if (!tables) {
      width = 1;
      while (width < rows) width = width == 8 ? kLowBitRows : 2 * width;
      if (rows > kLowBitRows) continue;
      depth = (s.group + 31) / 32 * 32;
    }
    Canvas<uint8_t> tile(static_cast<size_t>(depth) * width);
    for (size_t i = 0; i < tile.size(); ++i) tile.data()[i] = 0;
    for (int32_t r = 0; r < rows; ++r) {
      for (int32_t i = 0; i < s.group; ++i) {
        const size_t at = tables      ? static_cast<size_t>(i) * width + r
                          : registers ? static_cast<size_t>(r) * depth + i
                                      : (static_cast<size_t>(i / 4) * width + r) * 4 + i % 4;
        tile.data()[at] = static_cast<uint8_t>(x[static_cast<size_t>(r) * s.group + i]);
      }
    }
    const Exact in(tile);
    const int8_t* const entries = reinterpret_cast<const int8_t*>(in.data());
    for (auto [from, to] : parts(s.outputs, kLowBitOutputs)) {
      Canvas<int32_t> sums(static_cast<size_t>(rows), stride, static_cast<size_t>(to - from));
      if (tables) {
        Canvas<uint8_t> scratch(k.lowbit_scratch_bytes(s, to - from));
        k.lowbit_tables(s, weights.data(), group, entries, rows, from, to, sums.data(), stride,
                        scratch.data());
        check(scratch.intact(), "lowbit_tables wrote outside its scratch");
      } else if (registers) {
        Canvas<uint8_t> scratch(k.lowbit_register_scratch_bytes(s, rows));
        k.lowbit_registers(s, weights.data(), group, entries, rows, from, to, sums.data(), stride,
                           scratch.data());
        check(scratch.intact(), "lowbit_registers wrote outside its scratch");
      } else {
        k.lowbit_dense(s, weights.data(), group, entries, width, rows, from, to, sums.data(),
                       stride);
      }
      check(sums.intact(), "wrote outside its sums");
      int wrong = 0;
      for (int32_t r = 0; r < rows; ++r) {
        for (int32_t m = from; m < to; ++m) {
          int32_t want = 0;
          for (int32_t i = 0; i < s.group; ++i) {
            const int32_t u = codes[static_cast<size_t>(m) * s.depth + group * s.group + i];
            want += (u - (tables ? middle : 0)) * x[static_cast<size_t>(r) * s.group + i];
          }
          wrong += sums.data()[static_cast<size_t>(r) * stride + (m - from)] != want ? 1 : 0;
        }
      }
      check(wrong == 0, "%s: %d sums of outputs %d..%d are wrong", name, wrong, from, to);
    }
  }
}

void test_lowbit_finish(const Kernels& k, int32_t rows, int32_t outputs, int mode) {
  begin("lowbit_finish, rows %d, outputs %d, mode %d", rows, outputs, mode);
  const size_t n = static_cast<size_t>(outputs), height = static_cast<size_t>(rows);
  Guarded<int32_t> sums(height * n), zero(n), x_sum(height);
  Guarded<float> scale(n), row_scale(height);
  for (size_t i = 0; i < sums.size(); ++i) sums[i] = pick(-1000000, 1000000);
  for (size_t m = 0; m < n; ++m) {
    zero[m] = pick(-15, 15);
    scale[m] = uniform(2.0f);
  }
  for (size_t r = 0; r < height; ++r) {
    x_sum[r] = pick(-100000, 100000);
    row_scale[r] = uniform(1.0f);
  }
  const LowBitFinish f{.times = 2,
                       .plus = pick(-15, 1),
                       .zero = (mode & 1) != 0 ? zero.data() : nullptr,
                       .scale = scale.data(),
                       .x_sum = x_sum.data(),
                       .first = (mode & 2) != 0,
                       .row_scale = (mode & 4) != 0 ? row_scale.data() : nullptr};
  const size_t stride = n + static_cast<size_t>(pick(0, 3));
  Canvas<float> mine(height, stride, n), want(height, stride, n);
  for (size_t r = 0; r < height; ++r) {
    for (size_t m = 0; m < n; ++m) {
      mine.data()[r * stride + m] = want.data()[r * stride + m] = uniform(10.0f);
    }
  }
  k.lowbit_finish(f, rows, outputs, sums.data(), n, mine.data(), stride);
  kScalar.lowbit_finish(f, rows, outputs, sums.data(), n, want.data(), stride);
  mine.expect(want, "lowbit_finish");
}

void test_lowbit_quantize(const Kernels& k, size_t n, float size) {
  begin("lowbit_quantize, %zu values up to %a", n, static_cast<double>(size));
  Guarded<float> x(n, coin());
  for (size_t i = 0; i < n; ++i) x[i] = pick(0, 9) == 0 ? 0.0f : uniform(size);
  if (n > 2 && coin()) x[n - 1] = -size;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float none[] = {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()};
  if (pick(0, 3) == 0) x[static_cast<size_t>(pick(0, static_cast<int>(n) - 1))] = none[pick(0, 2)];
  Canvas<uint8_t> mine(n), want(n);
  const float a = k.lowbit_quantize(x.data(), n, reinterpret_cast<int8_t*>(mine.data()));
  const float b = kScalar.lowbit_quantize(x.data(), n, reinterpret_cast<int8_t*>(want.data()));
  check(same(a, b), "the step is %a, not %a", static_cast<double>(a), static_cast<double>(b));
  mine.expect(want, "lowbit_quantize");
}

void test_lowbit(const Kernels& k) {
  for (const int32_t levels : {2, 3, 4, 8, 16}) {
    for (int i = 0; i < 60; ++i) {
      begin("draw");
      const int32_t group = i % 3 == 0 ? any_of({32, 64, 128}) : pick(1, 200);
      const LowBitShape s{
          .depth = group * pick(1, 3), .outputs = pick(1, 70), .levels = levels, .group = group};
      test_lowbit(k, s, pick(1, i % 2 == 0 ? kLowBitRows : kTableRows),
                  i % 4 == 3 ? pick(1, 2) : 0);
    }
    // Around the depths where sums of 16 bits are full.
    for (int32_t depth = 1; depth < 600; depth += 1 + depth / 16) {
      for (const int fill : {1, 2}) {
        test_lowbit(k, {.depth = depth, .outputs = 17, .levels = levels, .group = depth}, 5, fill);
      }
    }
    test_lowbit(k, {.depth = 9, .outputs = 2100, .levels = levels, .group = 9}, 12, 0);
    for (const int fill : {0, 1, 2}) {
      test_lowbit(k, {.depth = 523, .outputs = 321, .levels = levels, .group = 523}, 3, fill);
    }
  }
  for (int mode = 0; mode < 8; ++mode) {
    for (const int32_t outputs : {1, 7, 8, 9, 15, 16, 17, 33, 64}) {
      test_lowbit_finish(k, pick(1, 5), outputs, mode);
    }
  }
  for (size_t n = 1; n < 70; ++n) {
    for (const float size : {1.0f, 1e30f, 1e-30f, 0x1p-120f, 1e-40f}) {
      test_lowbit_quantize(k, n, size);
    }
  }
}

}  // namespace
}  // namespace lutra
