// Every instruction set that runs here against the scalar kernels, at the edges of tiles and of
// numbers, then whole layers and a plan. Plain main, so that it runs under sanitizers and
// emulators.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/plan.h"
#include "engine/steps_basic.h"
#include "engine/steps_conv.h"
#include "kernels/dispatch.h"

namespace {

using namespace lutra;

int passed = 0, failed = 0;
std::mt19937 random_bits(1);

void check(bool ok, const std::string& what) {
  ++(ok ? passed : failed);
  if (!ok) std::printf("FAILED: %s\n", what.c_str());
}

int pick(int low, int high) { return low + static_cast<int>(random_bits() % (high - low + 1)); }

template <class T>
std::vector<T> integers(size_t n, int low, int high) {
  std::vector<T> v(n);
  for (T& x : v) x = static_cast<T>(pick(low, high));
  return v;
}

std::vector<float> floats(size_t n, float size = 1.0f) {
  std::uniform_real_distribution<float> each(-size, size);
  std::vector<float> v(n);
  for (float& x : v) x = each(random_bits);
  return v;
}

// Exactly n elements, 64-byte aligned, so that a sanitizer sees one byte too many on either side.
template <class T>
class Aligned {
 public:
  explicit Aligned(size_t n) : size_(n), data_(new (std::align_val_t(64)) T[n]()) {}
  ~Aligned() { operator delete[](data_, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  T* data() { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  size_t size() const { return size_; }

 private:
  size_t size_;
  T* data_;
};

template <class T>
bool same(const T* a, const T* b, size_t n) {
  return n == 0 || std::memcmp(a, b, n * sizeof(T)) == 0;
}

std::string text(const PqShape& s) {
  return "books " + std::to_string(s.books) + ", K " + std::to_string(s.centroids) + ", V " +
         std::to_string(s.dim) + ", outputs " + std::to_string(s.outputs);
}

// Planes of `tile` rows from rows of values: planes[v][r] = rows[r][v]; other lanes get `filler`.
void to_planes(const std::vector<uint8_t>& rows, int count, int values, int tile, uint8_t filler,
               uint8_t* planes) {
  for (int v = 0; v < values; ++v) {
    for (int r = 0; r < tile; ++r) planes[v * tile + r] = r < count ? rows[r * values + v] : filler;
  }
}

void test_quantize(const Kernels& k) {
  std::vector<float> x = floats(300, 200.0f);
  for (int i = -80; i < 140; ++i) {
    const float half = static_cast<float>(i) + 0.5f;
    for (float f : {half, std::nextafter(half, -1e9f), std::nextafter(half, 1e9f)}) x.push_back(f);
  }
  const float inf = std::numeric_limits<float>::infinity();
  for (float f : {std::nanf(""), -std::nanf(""), inf, -inf, 3e38f, -3e38f, 1e-45f, -1e-45f, 0.0f,
                  -0.0f, 2147483648.0f, -2147483648.0f, 1e10f}) {
    x.push_back(f);
  }
  for (float scale : {1.0f, 0.1f, 1e-38f, 1e30f}) {
    for (int bits : {1, 4, 7}) {
      const int qmax = (1 << bits) - 1;
      for (int zero : {0, qmax / 2 + 1, qmax}) {
        for (size_t n :
             {size_t{0}, size_t{1}, size_t{7}, size_t{8}, size_t{15}, size_t{17}, x.size()}) {
          // The end of the input and of the output are the end of their memory.
          const std::vector<float> in(x.end() - static_cast<long>(n), x.end());
          std::vector<uint8_t> a(n, 0xee), b(n, 0xee);
          kScalar.quantize(in.data(), n, scale, zero, qmax, a.data());
          k.quantize(in.data(), n, scale, zero, qmax, b.data());
          check(same(a.data(), b.data(), n), std::string(k.name) + " quantize");
        }
      }
    }
  }
}

struct Tables {
  std::vector<uint8_t> centroids;
  std::vector<int8_t> tables;
};

Tables tables(const PqShape& s, int kind) {
  const size_t rows = static_cast<size_t>(s.books) * s.centroids;
  if (kind == 0) {
    return {integers<uint8_t>(rows * s.dim, 0, 127), integers<int8_t>(rows * s.outputs, -128, 127)};
  }
  if (kind == 1) {  // everything as large as it can be: ties everywhere
    return {std::vector<uint8_t>(rows * s.dim, 127), std::vector<int8_t>(rows * s.outputs, -128)};
  }
  return {std::vector<uint8_t>(rows * s.dim, 0), std::vector<int8_t>(rows * s.outputs, 127)};
}

void test_encode(const Kernels& k, const PqShape& s, int kind) {
  const Tables t = tables(s, kind);
  const int values = s.books * s.dim, count = k.row_tile;
  const std::vector<uint8_t> rows =
      kind == 0 ? integers<uint8_t>(static_cast<size_t>(count) * values, 0, 127)
                : std::vector<uint8_t>(static_cast<size_t>(count) * values, 127);
  Aligned<uint8_t> packed(k.centroid_bytes(s)), plain(kScalar.centroid_bytes(s));
  k.pack_centroids(s, t.centroids.data(), packed.data());
  kScalar.pack_centroids(s, t.centroids.data(), plain.data());
  Aligned<uint8_t> patch(static_cast<size_t>(values) * k.row_tile);
  Aligned<uint8_t> codes(static_cast<size_t>(s.books) * k.row_tile);
  to_planes(rows, count, values, k.row_tile, 0, patch.data());
  const int half = s.books / 2;  // in two calls, as the engine does
  k.encode(s, packed.data(), 0, half, patch.data(), codes.data());
  k.encode(s, packed.data(), half, s.books,
           patch.data() + static_cast<size_t>(half) * s.dim * k.row_tile,
           codes.data() + static_cast<size_t>(half) * k.row_tile);
  bool ok = true;
  for (int first = 0; first < count; first += kScalar.row_tile) {
    const int n = kScalar.row_tile;
    Aligned<uint8_t> small(static_cast<size_t>(values) * n), want(static_cast<size_t>(s.books) * n);
    to_planes({rows.begin() + first * values, rows.begin() + (first + n) * values}, n, values, n, 0,
              small.data());
    kScalar.encode(s, plain.data(), 0, s.books, small.data(), want.data());
    for (int b = 0; b < s.books; ++b) {
      ok = ok && same(codes.data() + b * k.row_tile + first, want.data() + b * n, n);
    }
  }
  check(ok, std::string(k.name) + " encode, " + text(s) + ", kind " + std::to_string(kind));
}

void test_lookup(const Kernels& k, const PqShape& s, int kind, int rows) {
  const Tables t = tables(s, kind);
  Aligned<uint8_t> packed(k.table_bytes(s)), plain(kScalar.table_bytes(s));
  k.pack_tables(s, t.tables.data(), packed.data());
  kScalar.pack_tables(s, t.tables.data(), plain.data());
  const int padded = (s.books + k.book_tile - 1) / k.book_tile * k.book_tile;
  Aligned<uint8_t> codes(static_cast<size_t>(padded) * k.row_tile), space(codes.size());
  const auto each = integers<uint8_t>(static_cast<size_t>(s.books) * rows, 0, s.centroids - 1);
  for (int b = 0; b < s.books; ++b) {
    std::memcpy(codes.data() + b * k.row_tile, each.data() + b * rows, rows);
  }
  const auto scale = floats(s.outputs), bias = floats(s.outputs);
  const size_t size = static_cast<size_t>(s.outputs) * rows;
  const auto residual = floats(size, 1000.0f);
  for (int epilogue = 0; epilogue < 4; ++epilogue) {
    std::vector<float> a(size), b(size);
    const bool clamp = (epilogue & 2) != 0;
    const Epilogue e{.scale = epilogue == 3 ? nullptr : scale.data(),
                     .bias = bias.data(),
                     .residual = (epilogue & 1) ? residual.data() : nullptr,
                     .out = a.data(),
                     .residual_stride = static_cast<size_t>(rows),
                     .out_stride = static_cast<size_t>(rows),
                     .rows = rows,
                     .clamp = clamp,
                     .low = 0.0f,
                     .high = 6.0f};
    k.lookup(s, packed.data(), codes.data(), space.data(), e);
    for (int first = 0; first < rows; first += kScalar.row_tile) {
      const int n = std::min(kScalar.row_tile, rows - first);
      Aligned<uint8_t> small(static_cast<size_t>(s.books) * kScalar.row_tile);
      for (int book = 0; book < s.books; ++book) {
        std::memcpy(small.data() + book * kScalar.row_tile, each.data() + book * rows + first, n);
      }
      Epilogue part = e;
      part.out = b.data() + first;
      part.residual = e.residual ? e.residual + first : nullptr;
      part.rows = n;
      kScalar.lookup(s, plain.data(), small.data(), nullptr, part);
    }
    check(same(a.data(), b.data(), size), std::string(k.name) + " lookup, " + text(s) + ", rows " +
                                              std::to_string(rows) + ", epilogue " +
                                              std::to_string(epilogue));
  }
}

void test_gemm(const Kernels& k, int depth, int outputs, int rows) {
  const int blocks = (outputs + kGemmOutputs - 1) / kGemmOutputs;
  const auto weights = floats(static_cast<size_t>(blocks) * depth * kGemmOutputs);
  const auto bias = floats(outputs), x = floats(static_cast<size_t>(rows) * depth);
  const size_t size = static_cast<size_t>(outputs) * rows;
  auto run = [&](const Kernels& kernels, std::vector<float>& y) {
    for (int first = 0; first < rows; first += kernels.row_tile) {
      const int n = std::min(kernels.row_tile, rows - first);
      Aligned<float> patch(static_cast<size_t>(depth) * kernels.row_tile);
      for (int d = 0; d < depth; ++d) {
        for (int r = 0; r < n; ++r) patch[d * kernels.row_tile + r] = x[(first + r) * depth + d];
      }
      kernels.gemm(patch.data(), depth, weights.data(), outputs,
                   {.scale = nullptr,
                    .bias = bias.data(),
                    .residual = nullptr,
                    .out = y.data() + first,
                    .residual_stride = 0,
                    .out_stride = static_cast<size_t>(rows),
                    .rows = n,
                    .clamp = true,
                    .low = -1.0f,
                    .high = 1.0f});
    }
  };
  std::vector<float> a(size), b(size);
  run(k, a);
  run(kScalar, b);
  check(same(a.data(), b.data(), size),
        std::string(k.name) + " gemm, depth " + std::to_string(depth) + ", outputs " +
            std::to_string(outputs) + ", rows " + std::to_string(rows));
}

void test_linear(const Kernels& k, int depth, int outputs, int stride) {
  const size_t padded = (outputs + kLinearOutputs - 1) / kLinearOutputs * kLinearOutputs;
  const auto weights = floats(padded * depth), bias = floats(outputs);
  const auto x = floats(static_cast<size_t>(depth - 1) * stride + 1);
  Aligned<float> a(padded), b(padded);
  k.linear(x.data(), stride, depth, weights.data(), bias.data(), outputs, a.data());
  kScalar.linear(x.data(), stride, depth, weights.data(), bias.data(), outputs, b.data());
  check(same(a.data(), b.data(), outputs), std::string(k.name) + " linear, depth " +
                                               std::to_string(depth) + ", outputs " +
                                               std::to_string(outputs));
}

void test_table_grad(const Kernels& k, int outputs) {
  const int books = 3, centroids = 16, count = 50, stride = 53;
  const auto codes = integers<uint8_t>(books * stride, 0, centroids - 1);
  const auto rows = floats(static_cast<size_t>(count) * outputs);
  std::vector<float> a = floats(static_cast<size_t>(books) * centroids * outputs), b = a;
  k.table_grad(codes.data(), stride, books, centroids, rows.data(), count, outputs, a.data());
  kScalar.table_grad(codes.data(), stride, books, centroids, rows.data(), count, outputs, b.data());
  check(same(a.data(), b.data(), a.size()),
        std::string(k.name) + " table_grad, outputs " + std::to_string(outputs));
}

PqLayer make_layer(const Kernels& k, const PqShape& s, const ConvGeometry& g, unsigned seed) {
  random_bits.seed(seed);
  Tables t = tables(s, 0);
  const int64_t used = g.depth() - int64_t{s.books - 1} * s.dim;
  for (int c = 0; c < s.centroids; ++c) {
    uint8_t* last =
        t.centroids.data() + (static_cast<size_t>(s.books - 1) * s.centroids + c) * s.dim;
    std::fill(last + used, last + s.dim, uint8_t{0});
  }
  const auto scale = floats(s.outputs), bias = floats(s.outputs);
  return PqLayer(k, s, g, {.scale = 0.05f, .zero = 64, .bits = 7}, t.centroids.data(),
                 t.tables.data(), scale.data(), bias.data());
}

// A layer on images whose memory ends with the last pixel, in both memory orders.
void test_layer(const Kernels& k, const ConvGeometry& g, int64_t n, int64_t h, int64_t w, int dim,
                int outputs) {
  const PqShape s{.books = static_cast<int32_t>((g.depth() + dim - 1) / dim),
                  .centroids = 16,
                  .dim = dim,
                  .outputs = outputs};
  const PqLayer layer = make_layer(k, s, g, 7), plain = make_layer(kScalar, s, g, 7);
  const int64_t oh = g.out_h(h), ow = g.out_w(w), rows = n * oh * ow;
  const auto x = floats(static_cast<size_t>(n * g.channels * h * w), 4.0f);
  ThreadPool pool(3);
  for (bool last : {false, true}) {
    auto view = [&](const float* data, int64_t c, int64_t hh, int64_t ww) {
      return ImageView{.data = const_cast<float*>(data),
                       .n = n,
                       .c = c,
                       .h = hh,
                       .w = ww,
                       .sn = c * hh * ww,
                       .sc = last ? 1 : hh * ww,
                       .sh = last ? c * ww : ww,
                       .sw = last ? c : 1};
    };
    auto run = [&](const PqLayer& which, std::vector<float>& y, std::vector<uint8_t>& codes) {
      Aligned<uint8_t> memory(which.workspace_bytes(n, h, w, pool.threads()));
      std::memset(memory.data(), 0xff, memory.size());  // nothing may depend on what was there
      which.run({.input = view(x.data(), g.channels, h, w),
                 .output = view(y.data(), outputs, oh, ow),
                 .residual = nullptr,
                 .clamp = {},
                 .codes = codes.data()},
                memory.data(), pool);
    };
    const size_t size = static_cast<size_t>(rows * outputs);
    std::vector<float> a(size), b(size);
    std::vector<uint8_t> c(static_cast<size_t>(s.books * rows)), d(c);
    run(layer, a, c);
    run(plain, b, d);
    check(same(a.data(), b.data(), size) && same(c.data(), d.data(), c.size()),
          std::string(k.name) + " layer, " + text(s));

    const auto gradient = floats(size);
    std::vector<float> grad(static_cast<size_t>(s.books) * s.centroids * outputs), other(grad);
    table_gradient(k, s, c.data(), view(gradient.data(), outputs, oh, ow), grad.data(), pool);
    table_gradient(kScalar, s, c.data(), view(gradient.data(), outputs, oh, ow), other.data(),
                   pool);
    check(same(grad.data(), other.data(), grad.size()), std::string(k.name) + " table gradient");

    const size_t cells = static_cast<size_t>(s.books) * s.centroids;
    std::vector<int64_t> sums(cells * dim), counts(cells), sums2(sums), counts2(counts);
    const Quantization q{.scale = 0.05f, .zero = 64, .bits = 7};
    cluster_sums(k, s, g, q, view(x.data(), g.channels, h, w), c.data(), sums.data(), counts.data(),
                 pool);
    cluster_sums(kScalar, s, g, q, view(x.data(), g.channels, h, w), c.data(), sums2.data(),
                 counts2.data(), pool);
    check(sums == sums2 && counts == counts2, std::string(k.name) + " cluster sums");
  }
}

// conv -> [pq conv + residual + relu6] -> pool -> slice, pad, concat -> reshape -> pq linear and
// linear over three axes, with residuals -> reshape -> linear -> softmax
std::vector<float> run_plan(const Kernels& k, int threads, int64_t n) {
  Plan plan(k, threads);
  const int x = plan.add_input();
  const ConvGeometry g{.channels = 3, .kernel_h = 3, .kernel_w = 3, .pad_h = 1, .pad_w = 1};
  random_bits.seed(3);
  const auto weight = floats(6 * 27), bias = floats(6), dense = floats(10 * 240), tail = floats(10);
  const int a = plan.add_step(std::make_unique<ConvStep>(k, g, 6, 1, weight.data(), bias.data(),
                                                         false, Clamp{true, 0.0f, 6.0f}),
                              {x});
  const PqShape s{.books = 3, .centroids = 16, .dim = 9, .outputs = 6};
  const int b = plan.add_step(
      std::make_unique<PqConvStep>(make_layer(k, s, g, 9), false, true, Clamp{true, 0.0f, 6.0f}),
      {x, a});
  const int c = plan.add_step(
      pool_step(Pool::kMax, {.kernel_h = 2, .kernel_w = 2, .stride_h = 2, .stride_w = 2}, true,
                false),
      {b});
  const int d = plan.add_step(slice_step(1, 0, 6, 2), {c});
  const int e = plan.add_step(pad_step({0, 1, 0, 0}, {0, 0, 0, 0}, 0.5f), {d});
  const int f = plan.add_step(concat_step(1), {c, e});
  const int rows = plan.add_step(reshape_step({6, 40}), {f});
  const PqShape t{.books = 5, .centroids = 32, .dim = 8, .outputs = 40};
  const int p = plan.add_step(std::make_unique<PqConvStep>(make_layer(k, t, {.channels = 40}, 10),
                                                           true, true, Clamp{true, 0.0f, 6.0f}),
                              {rows, rows});
  const auto square = floats(40 * 40);
  const int q = plan.add_step(
      std::make_unique<LinearStep>(k, 40, 40, square.data(), square.data(), true, Clamp{}),
      {p, rows});
  const int h = plan.add_step(reshape_step({240}), {q});
  const int i = plan.add_step(
      std::make_unique<LinearStep>(k, 240, 10, dense.data(), tail.data(), false, Clamp{}), {h});
  plan.set_outputs({plan.add_step(softmax_step(1), {i}), b});
  random_bits.seed(4);
  const auto in = floats(static_cast<size_t>(n * 3 * 7 * 11), 4.0f);
  std::vector<float> y(static_cast<size_t>(n * 10)), z(static_cast<size_t>(n * 6 * 77));
  for (int turn = 0; turn < 2; ++turn) {
    auto context = plan.acquire({Shape{n, 3, 7, 11}});
    plan.execute(*context, {in.data()}, {y.data(), z.data()});
    plan.release(std::move(context));
  }
  y.insert(y.end(), z.begin(), z.end());
  return y;
}

void test_isa(const Kernels& k) {
  test_quantize(k);
  for (int dim : {1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 18, 27, 36, 63, 64}) {
    for (int centroids : {8, 16, 32, 64}) {
      for (int kind : {0, 1, 2}) {
        test_encode(k, {.books = 3, .centroids = centroids, .dim = dim, .outputs = 1}, kind);
      }
    }
  }
  for (int rows = 1; rows <= k.row_tile; rows += rows < 18 ? 1 : 5) {
    for (int centroids : {8, 16, 32, 64}) {
      for (int books : {1, 2, 3, 4, 5}) {
        test_lookup(k, {.books = books, .centroids = centroids, .dim = 1, .outputs = pick(1, 9)}, 0,
                    rows);
      }
    }
    for (int outputs : {1, 3, 4, 5, 17}) test_gemm(k, pick(1, 40), outputs, rows);
  }
  for (int books : {255, 256, 257, 600}) {
    for (int kind : {0, 1, 2}) {
      test_lookup(k, {.books = books, .centroids = 64, .dim = 1, .outputs = 5}, kind, k.row_tile);
    }
  }
  for (int outputs : {1, 7, 8, 15, 16, 17, 63, 64, 65, 129}) {
    test_linear(k, 1, outputs, 1);
    test_linear(k, 33, outputs, 3);
    test_table_grad(k, outputs);
  }
  for (int64_t w : {1, 2, 15, 16, 17, 33, 65}) {
    test_layer(k, {.channels = 5}, 3, 1, w, 3, 6);
    test_layer(k, {.channels = 40}, 2, 2, w, 16, 3);
    test_layer(k, {.channels = 3, .kernel_h = 3, .kernel_w = 3, .pad_h = 1, .pad_w = 1}, 2, 4, w, 9,
               7);
    test_layer(k,
               {.channels = 2,
                .kernel_h = 2,
                .kernel_w = 3,
                .stride_h = 2,
                .stride_w = 3,
                .pad_h = 3,
                .pad_w = 4,
                .dilation_h = 2,
                .dilation_w = 2},
               2, 5, w, 4, 5);
  }
  for (int64_t n : {1, 2, 9}) {
    check(run_plan(k, 1, n) == run_plan(kScalar, 1, n), std::string(k.name) + " plan");
    check(run_plan(k, 3, n) == run_plan(kScalar, 2, n), std::string(k.name) + " plan with threads");
  }
}

void test_thread_pool() {
  ThreadPool pool(4);
  for (int turn = 0; turn < 200; ++turn) {
    const size_t bad = static_cast<size_t>(turn % 50);
    std::string caught;
    try {
      pool.run(50, 1e6, [&](size_t i, int) {
        if (i >= bad) throw std::runtime_error("item");
      });
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    check(caught == "item", "an exception reaches the caller");
    std::vector<int> done(97);
    pool.run(done.size(), 1e6, [&](size_t i, int) { ++done[i]; });
    check(done == std::vector<int>(97, 1), "the pool works on after an exception");
  }
}

}  // namespace

int main() {
  test_thread_pool();
  for (const lutra::Kernels* k : lutra::runnable_kernels()) {
    const int before = passed;
    test_isa(*k);
    std::printf("%s: %d passed\n", k->name, passed - before);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
