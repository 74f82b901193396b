// The part of kernels_test.cc about functions, their tables, norms, softmax and attention.
#pragma once

#include "kernel_cases.h"

namespace lutra {
namespace {

// Any float at all, or one of a usual size, or an edge.
float any_float() {
  const int kind = pick(0, 3);
  if (kind == 0) {
    const uint32_t bits = random_bits();
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
  }
  if (kind == 1) {
    const float edge =
        any_of({0.0f, 0.9f, 1.0f, 2.0f, 7.0f, 9.0f, 10.0f, 87.0f, 88.0f, 88.7f, 88.8f, 103.9f,
                104.0f, 1e-45f, 1.1754944e-38f, 3.4028235e38f, kInf, kNan});
    return coin() ? edge : -edge;
  }
  return uniform(kind == 2 ? 4.0f : 100.0f);
}

template <class Run>  // void(const Kernels&, const float*, size_t, float*)
void test_floats_to_floats(const Kernels& k, size_t n, const Run& run) {
  Guarded<float> x(n, coin());
  for (size_t i = 0; i < n; ++i) x[i] = any_float();
  const size_t shift = static_cast<size_t>(pick(0, 9));
  Canvas<float> mine(1, n, n, shift), want(1, n, n, shift);
  run(k, x.data(), mine.data());
  run(kScalar, x.data(), want.data());
  for (size_t i = 0; i < n; ++i) {
    if (same(mine.data()[i], want.data()[i])) continue;
    check(false, "%.9g (%a) became %.9g, not %.9g", static_cast<double>(x[i]),
          static_cast<double>(x[i]), static_cast<double>(mine.data()[i]),
          static_cast<double>(want.data()[i]));
    return;
  }
  check(mine.intact(), "wrote outside its memory");
}

void test_function(const Kernels& k) {
  for (int f = 0; f <= static_cast<int>(Function::kReciprocal); ++f) {
    for (size_t n = 0; n <= 69; ++n) {
      const size_t size = n < 68 ? n : 3000;
      begin("function %d of %zu values", f, size);
      test_floats_to_floats(k, size, [&](const Kernels& by, const float* x, float* y) {
        by.function(static_cast<Function>(f), x, size, y);
      });
    }
  }
}

// Slopes and intercepts; those of the outer entries are often level.
struct RandomLines {
  Guarded<float> slope, intercept;
  explicit RandomLines(size_t entries) : slope(entries), intercept(entries) {
    fill_floats(slope, 3.0f);
    fill_floats(intercept, 3.0f);
    for (size_t e : {size_t{0}, entries / 2, entries - 1}) {
      if (coin()) slope[e] = any_of({0.0f, -0.0f, 1.0f});
      if (coin()) intercept[e] = any_of({0.0f, -0.0f, 1.0f});
    }
  }
  Segments segments() const {
    return {.entries = static_cast<int32_t>(slope.size()),
            .slope = slope.data(),
            .intercept = intercept.data()};
  }
};

void test_piecewise(const Kernels& k) {
  for (size_t entries : {8, 16, 32}) {
    for (size_t n = 0; n <= 80; ++n) {
      const size_t size = n < 68 ? n : 2000;
      begin("piecewise of %zu entries, %zu values", entries, size);
      const RandomLines lines(entries);
      Guarded<float> breakpoint(entries - 1, coin());
      for (size_t i = 0; i < breakpoint.size(); ++i) {
        breakpoint[i] = n % 4 == 0 ? static_cast<float>(pick(-5, 5)) : uniform(6.0f);
      }
      std::sort(breakpoint.data(), breakpoint.data() + breakpoint.size());
      const Piecewise p{.entries = static_cast<int32_t>(entries),
                        .breakpoint = breakpoint.data(),
                        .slope = lines.slope.data(),
                        .intercept = lines.intercept.data()};
      test_floats_to_floats(k, size, [&](const Kernels& by, const float* x, float* y) {
        by.piecewise(p, x, size, y);
      });
    }
  }
}

void test_segments(const Kernels& k) {
  for (size_t entries : {8, 16, 32}) {
    for (auto kernel : {&Kernels::table_exp, &Kernels::table_reciprocal, &Kernels::table_rsqrt}) {
      for (size_t n = 0; n <= 72; ++n) {
        const size_t size = n < 68 ? n : 3000;
        begin("table of %zu entries indexed by bits, %zu values", entries, size);
        const RandomLines lines(entries);
        test_floats_to_floats(k, size, [&](const Kernels& by, const float* x, float* y) {
          (by.*kernel)(lines.segments(), x, size, y);
        });
      }
    }
  }
}

}  // namespace
}  // namespace lutra
