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
  for (int f = 0; f <= static_cast<int>(Function::kMish); ++f) {
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
        const float even = static_cast<float>(i) * 12.0f / static_cast<float>(entries) - 6.0f;
        breakpoint[i] = n % 4 == 0   ? static_cast<float>(pick(-5, 5))  // some of them equal
                        : n % 4 == 1 ? uniform(6.0f)
                        : n % 4 == 2 ? even
                                     : even + uniform(0.1f);
      }
      std::sort(breakpoint.data(), breakpoint.data() + breakpoint.size());
      if (n == 69) breakpoint[0] = -kInf;
      if (n == 70) breakpoint[entries - 2] = kInf;
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

// --- rows across planes --------------------------------------------------------------------------

// A table of 2^f, of 1 / m, of 1 / sqrt(m) or of nothing: what it is of does not matter here.
Segments any_segments(const RandomLines& lines) {
  Segments s = lines.segments();
  if (coin()) s = {.entries = 0, .slope = nullptr, .intercept = nullptr};
  return s;
}

void fill_special(Guarded<float>& v, float size, bool special) {
  fill_floats(v, size);
  if (special) v[random_bits() % v.size()] = any_of({kNan, kInf, -kInf, 1e-45f, 3e38f});
}

// What a kernel writes: floats and bytes of `planes` planes.
struct PlaneResults {
  Canvas<float> out;
  Canvas<uint8_t> q[kMaxQuantized];
  PlaneResults(size_t planes, size_t stride, size_t width, size_t shift)
      : out(planes, stride, width, shift),
        q{{planes, stride, width, shift}, {planes, stride + 5, width, 2 * shift}} {}
  PlaneOutput output(bool floats, int quantized, const Grid* grids) {
    PlaneOutput to{.out = floats ? out.data() : nullptr,
                   .stride = out_stride,
                   .quantized = quantized,
                   .q = {}};
    for (int i = 0; i < quantized; ++i) {
      to.q[i] = {.grid = grids[i], .out = q[i].data(), .stride = out_stride + (i == 0 ? 0 : 5)};
    }
    return to;
  }
  size_t out_stride = 0;
};

// run(kernels, output) with floats, bytes or both.
template <class Run>
void test_planes(const Kernels& k, size_t planes, size_t width, const Run& run) {
  const size_t stride = width + any_of<size_t>({0, 0, 1, 9});
  const size_t shift = static_cast<size_t>(pick(0, 5));
  const Grid grids[kMaxQuantized] = {random_grid(), random_grid()};
  const int quantized = pick(0, kMaxQuantized);
  const bool floats = quantized == 0 || coin();
  PlaneResults mine(planes, stride, width, shift), want(planes, stride, width, shift);
  mine.out_stride = want.out_stride = stride;
  run(k, mine.output(floats, quantized, grids));
  run(kScalar, want.output(floats, quantized, grids));
  mine.out.expect(want.out, "floats");
  mine.q[0].expect(want.q[0], "q[0]");
  mine.q[1].expect(want.q[1], "q[1]");
}

void test_norm(const Kernels& k, size_t width, size_t rows, bool special) {
  begin("norm of %zu features, %zu rows, special %d", width, rows, special);
  const size_t stride = rows + any_of<size_t>({0, 0, 3, 50});
  Guarded<float> x((width - 1) * stride + rows, coin()), weight(width), bias(width);
  fill_special(x, 5.0f, special);
  fill_floats(weight, 2.0f);
  fill_floats(bias, 1.0f);
  if (!special && pick(0, 3) == 0) {  // no variance
    for (size_t i = 0; i < x.size(); ++i) x[i] = 1.5f;
  }
  const RandomLines lines(any_of<size_t>({8, 16, 32}));
  const Norm n{.width = static_cast<int32_t>(width),
               .center = coin(),
               .eps = any_of({0.0f, 1e-12f, 1e-5f}),
               .weight = weight.data(),
               .bias = coin() ? bias.data() : nullptr,
               .rsqrt = any_segments(lines)};
  test_planes(k, width, rows, [&](const Kernels& by, const PlaneOutput& to) {
    by.norm(n, x.data(), stride, rows, to);
  });
}

void test_softmax(const Kernels& k, size_t count, size_t rows, bool special) {
  begin("softmax of %zu, %zu rows, special %d", count, rows, special);
  const size_t stride = rows + any_of<size_t>({0, 0, 3, 50});
  Guarded<float> x((count - 1) * stride + rows, coin());
  fill_special(x, any_of({1.0f, 20.0f, 200.0f}), special);
  const RandomLines exp(any_of<size_t>({8, 16, 32})), reciprocal(any_of<size_t>({8, 16, 32}));
  const Softmax s{.count = static_cast<int32_t>(count),
                  .exp = any_segments(exp),
                  .reciprocal = any_segments(reciprocal)};
  const size_t shift = static_cast<size_t>(pick(0, 5));
  Canvas<float> mine(count, stride, rows, shift), want(count, stride, rows, shift);
  k.softmax(s, x.data(), stride, rows, mine.data());
  kScalar.softmax(s, x.data(), stride, rows, want.data());
  mine.expect(want, "softmax");
}

void test_attention(const Kernels& k, int width, int keys, int queries, int masked, bool causal,
                    bool special) {
  begin("attention of %d features, %d keys, %d queries, mask %d, causal %d, special %d", width,
        keys, queries, masked, causal, special);
  const size_t d = static_cast<size_t>(width), s = static_cast<size_t>(keys);
  const size_t t = static_cast<size_t>(queries);
  const size_t q_stride = t + any_of<size_t>({0, 0, 3}), k_stride = s + any_of<size_t>({0, 0, 5});
  // keys before the first query, and values in rows: as in the cache of a decoder
  const bool rows = coin();
  const int past = coin() ? pick(0, keys) : 0;
  Guarded<float> q((d - 1) * q_stride + t, coin()), key((d - 1) * k_stride + s, coin()),
      value(rows ? s * d : (d - 1) * k_stride + s, coin());
  fill_special(q, 2.0f, special);
  fill_special(key, 2.0f, special);
  fill_special(value, 2.0f, special && !causal);
  Guarded<int32_t> mask(s, coin());
  const int length = pick(0, keys);
  for (size_t j = 0; j < s; ++j) {  // none, the first ones, any
    mask[j] = masked == 1 ? 0 : masked == 2 ? static_cast<int>(j) < length : any_of({0, 1, -7});
  }
  const RandomLines exp(any_of<size_t>({8, 16, 32})), reciprocal(any_of<size_t>({8, 16, 32}));
  const Attention a{.width = width,
                    .keys = keys,
                    .causal = causal,
                    .past = past,
                    .scale = any_of({0.125f, 0.3f, 1.0f}),
                    .q = q.data(),
                    .k = key.data(),
                    .v = value.data(),
                    .q_stride = q_stride,
                    .k_stride = k_stride,
                    .v_stride = rows ? 1 : k_stride,
                    .v_step = rows ? d : 1,
                    .mask = masked ? mask.data() : nullptr,
                    .exp = any_segments(exp),
                    .reciprocal = any_segments(reciprocal)};
  const int cut = pick(0, queries);  // two calls make the queries
  test_planes(k, d, t, [&](const Kernels& by, const PlaneOutput& to) {
    Canvas<uint8_t> scratch(by.attention_bytes(width, keys));
    by.attention(a, cut, queries, to, scratch.data());
    by.attention(a, 0, cut, to, scratch.data());
    check(scratch.intact(), "wrote outside its scratch");
  });
  if (masked || !rows) return;
  test_planes(k, d, t, [&](const Kernels& by, const PlaneOutput& to) {
    Canvas<uint8_t> scratch(by.attention_row_bytes(width, keys));
    for (int i = 0; i < queries; ++i) by.attention_row(a, i, to, scratch.data());
    check(scratch.intact(), "wrote outside its scratch");
  });
}

void test_rows_across_planes(const Kernels& k) {
  for (size_t rows = 1; rows <= 70; ++rows) {
    test_norm(k, static_cast<size_t>(1 + rows % 9), rows, rows % 3 == 0);
    test_softmax(k, static_cast<size_t>(1 + rows % 9), rows, rows % 3 == 0);
    const int n = static_cast<int>(rows);
    test_attention(k, 1 + n % 11, 1 + n * 7 % 40, n, n % 4, n % 3 == 0, n % 5 == 0);
  }
  for (size_t rows : {1, 17, 130}) {
    for (size_t width : {1, 2, 3, 4, 5, 64, 385}) {
      test_norm(k, width, rows, false);
      test_softmax(k, width, rows, false);
    }
  }
  for (int width : {1, 3, 8, 16, 29, 64}) {
    for (int keys : {1, 2, 7, 33, 70, 129}) {
      for (int masked = 0; masked < 4; ++masked) {
        for (bool causal : {false, true}) {
          test_attention(k, width, keys, causal ? keys : pick(1, 50), masked, causal, false);
        }
      }
    }
  }
  test_attention(k, 32, 513, 40, 0, false, false);
}

}  // namespace
}  // namespace lutra
