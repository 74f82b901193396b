// Every instruction set that runs here against the scalar kernels, bit for bit, at the edges of
// tiles, of memory and of numbers. Plain main, so that it runs under sanitizers and emulators;
// -v prints every case before it runs.
#include "kernel_cases.h"
#include "kernels/dispatch.h"
#include "kernels_dense_test.h"
#include "kernels_depthwise_test.h"
#include "kernels_functions_test.h"
#include "kernels_lookup_test.h"
#include "kernels_lowbit_test.h"
#include "kernels_pq_test.h"

namespace lutra {
namespace {

// --- quantize -----------------------------------------------------------------------------------

void test_quantize(const Kernels& k, const Grid& g, const std::vector<float>& values, size_t n) {
  begin("quantize %zu values, scale %.9g, inverse %.9g, zero %d, qmax %d", n,
        static_cast<double>(g.scale), static_cast<double>(g.inverse), g.zero, g.qmax);
  Guarded<float> x(n, coin());
  for (size_t i = 0; i < n; ++i) x[i] = values[values.size() - n + i];
  const size_t shift = static_cast<size_t>(pick(0, 9));
  Canvas<uint8_t> mine(1, n, n, shift), want(1, n, n, shift);
  k.quantize(x.data(), n, g, mine.data());
  kScalar.quantize(x.data(), n, g, want.data());
  for (size_t i = 0; i < n; ++i) {
    if (mine.data()[i] == want.data()[i]) continue;
    check(false, "%.9g (%a) became %d, not %d", static_cast<double>(x[i]),
          static_cast<double>(x[i]), mine.data()[i], want.data()[i]);
    return;
  }
  check(mine.intact(), "wrote outside its memory");
}

void test_quantize(const Kernels& k) {
  for (float scale : {1.0f, 0.1f, 0.0078125f, 3.14159f, 1234.5f, 1e-38f, 1e30f, 0.0f}) {
    for (int bits : {1, 2, 4, 7}) {
      const int qmax = (1 << bits) - 1;
      for (int zero : {0, qmax / 2 + 1, qmax}) {
        for (bool inverse : {false, true}) {
          begin("grids");
          // 0 stands for a scale of its own in every grid
          const float own = scale != 0.0f ? scale : std::exp2(uniform(8.0f));
          const Grid g = make_grid(own, zero, bits, inverse);
          if (inverse && g.inverse == 0.0f) continue;
          std::vector<float> x;
          around_steps(g, 3, [&](float f) { x.push_back(f); });
          for (int i = 0; i < 100; ++i) x.push_back(uniform(150.0f) * g.scale);
          x.insert(x.end(), {kNan, -kNan, kInf, -kInf, 3.4e38f, -3.4e38f, 1e-45f, -1e-45f, 0.0f,
                             -0.0f, 2147483648.0f, -2147483648.0f, 4294967296.0f, 1e10f, -1e10f});
          test_quantize(k, g, x, x.size());
          test_quantize(k, g, x, static_cast<size_t>(pick(0, 130)));
        }
      }
    }
  }
  std::vector<float> x(200);
  for (float& f : x) f = uniform(90.0f);
  for (size_t n = 0; n <= 140; ++n) {
    test_quantize(k, make_grid(0.7f, 64, 7, n % 2 != 0), x, n);
  }
}

// --- training -----------------------------------------------------------------------------------

void test_table_grad(const Kernels& k, int codebooks, int centroids, int count, int outputs) {
  begin("table_grad, codebooks %d, K %d, rows %d, outputs %d", codebooks, centroids, count,
        outputs);
  const size_t stride = static_cast<size_t>(count + pick(0, 9)), n = static_cast<size_t>(count);
  Guarded<uint8_t> codes(static_cast<size_t>(codebooks - 1) * stride + n);
  fill_integers(codes, 0, centroids - 1);
  Guarded<float> rows(n * static_cast<size_t>(outputs));
  fill_floats(rows, 10.0f);
  const size_t size = static_cast<size_t>(codebooks) * centroids * outputs;
  Canvas<float> mine(1, size, size, 1), want(1, size, size, 1);
  for (size_t i = 0; i < size; ++i) mine.data()[i] = want.data()[i] = uniform(10.0f);
  k.table_grad(codes.data(), stride, codebooks, centroids, rows.data(), count, outputs,
               mine.data());
  kScalar.table_grad(codes.data(), stride, codebooks, centroids, rows.data(), count, outputs,
                     want.data());
  mine.expect(want, "gradient");
}

void test_table_grad(const Kernels& k) {
  for (int outputs = 1; outputs <= 70; ++outputs) test_table_grad(k, 3, 16, 23, outputs);
  for (int centroids : {8, 16, 32, 64}) {
    for (int codebooks : {1, 2, 5}) {
      for (int count : {1, 2, 3, 64, 130}) test_table_grad(k, codebooks, centroids, count, 37);
    }
  }
  for (int outputs : {96, 127, 128, 129, 192, 255, 256, 257, 513}) {
    test_table_grad(k, 2, 16, 50, outputs);
  }
}

// --- everything ---------------------------------------------------------------------------------

// Every combination of what an epilogue can do, on small layers.
void test_epilogues(const Kernels& k) {
  for (int bits = 0; bits < 16; ++bits) {
    for (int clamp = 0; clamp < 5; ++clamp) {
      for (int quantized = 0; quantized <= kMaxQuantized; ++quantized) {
        for (int values = 0; values < 3; ++values) {
          const Mode mode{.offset = (bits & 1) != 0,
                          .scale = (bits & 2) != 0,
                          .residual = (bits & 4) != 0,
                          .out = (bits & 8) != 0,
                          .clamp = clamp,
                          .quantized = quantized,
                          .values = values};
          if (!mode.out && quantized == 0) continue;
          begin("draw");
          PqCase c = random_pq(k, Encoder::kTree, 16, 4, pick(1, 6), 7);
          test_pq(k, c, &mode);
          test_dense8(k, c.map, pick(1, 6), pick(1, 6), c.first, c.rows, Fill::kRandom, 0, &mode);
          if (k.conv8) {
            test_conv8(k, c.map, pick(1, 6), pick(1, 6), c.first, c.rows, Fill::kRandom, 4, &mode);
          }
          test_respond(k, random_lookup(k, 1, pick(1, 9), pick(1, 6)), &mode);
          if (!mode.offset) {
            test_gemm(k, static_cast<size_t>(pick(1, 6)), pick(1, 6), c.rows, false, &mode);
          }
        }
      }
    }
  }
}

void test_kernels(const Kernels& k) {
  cases = 0;
  isa = k.name;
  begin("constants");
  check(k.row_tile >= 1 && k.row_tile <= kMaxRowTile, "row_tile is %d", k.row_tile);
  check(k.row_tile % kScalar.row_tile == 0, "row_tile is %d", k.row_tile);
  check(k.codebook_tile >= 1, "codebook_tile is %d", k.codebook_tile);
  check(k.output_tile >= 1, "output_tile is %d", k.output_tile);
  test_quantize(k);
  test_encode(k);
  test_maps(k);
  test_rows(k);
  test_deep(k);
  test_lookup(k);
  test_wide(k);
  test_dense8(k);
  if (k.conv8) test_conv8(k);
  test_depthwise(k);
  test_respond(k);
  test_long_responses(k);
  test_lowbit(k);
  test_response_grad(k);
  test_floats(k);
  test_function(k);
  test_piecewise(k);
  test_segments(k);
  test_rows_across_planes(k);
  test_table_grad(k);
  test_epilogues(k);
}

}  // namespace
}  // namespace lutra

int main(int argc, char** argv) {
  using namespace lutra;
  verbose = argc > 1 && std::strcmp(argv[1], "-v") == 0;
  std::setvbuf(stdout, nullptr, _IOLBF, 4096);
  name_the_dying();
  for (const Kernels* k : runnable_kernels()) {
    const int before = passed, bad = failed;
    test_kernels(*k);
    std::printf("%s: %d cases, %d passed, %d failed\n", k->name, cases, passed - before,
                failed - bad);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
