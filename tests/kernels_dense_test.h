// The part of kernels_test.cc about dense layers.
#pragma once

#include "kernel_cases.h"

namespace lutra {
namespace {

// --- dense layers in int8 -----------------------------------------------------------------------

void test_dense8(const Kernels& k, const Map& m, int channels, int outputs, int first, int rows,
                 Fill fill, int weights, const Mode* mode = nullptr) {
  const int taps = m.taps(), depth = channels * taps;
  begin(
      "dense8, depth %d, taps %d, outputs %d, rows %d of %d from %d, fill %d, weights "
      "%d, " MAP_FORMAT,
      depth, taps, outputs, rows, m.rows(), first, static_cast<int>(fill), weights, MAP_VALUES(m));
  const Tile tile(m, depth, first, rows, k.row_tile, 127, fill);
  Canvas<uint8_t> gathered(k.gather8_bytes(depth));
  std::memset(gathered.data(), 0xff, gathered.size());
  k.gather8(depth, taps, tile.patch(), gathered.data());
  check(gathered.intact(), "gather8 wrote outside its memory");
  const Exact entries(gathered);

  Guarded<int8_t> w(static_cast<size_t>(depth) * outputs);
  for (size_t i = 0; i < w.size(); ++i) {
    const int v = weights == 0 ? pick(-127, 127) : weights == 1 ? 127 : weights == 2 ? -127 : 0;
    w[i] = static_cast<int8_t>(weights == 3 ? any_of({-127, 127}) : v);
  }
  Canvas<uint8_t> packed(k.dense8_bytes(depth, outputs));
  Canvas<uint8_t> plain(kScalar.dense8_bytes(depth, outputs));
  k.pack_dense8(depth, outputs, w.data(), packed.data());
  kScalar.pack_dense8(depth, outputs, w.data(), plain.data());
  check(packed.intact(), "pack_dense8 wrote outside its memory");
  const Exact packed_weights(packed);
  Finish finish(mode ? *mode : random_mode(), outputs, rows);
  finish.run(
      "dense8",
      [&](const Epilogue& e) {
        for (auto [from, to] : parts(outputs, k.output_tile)) {
          k.dense8(depth, outputs, packed_weights.data(), entries.data(), from, to, e);
        }
      },
      [&](int from, const Epilogue& e) {
        std::vector<uint8_t> x(kScalar.gather8_bytes(depth));
        kScalar.gather8(depth, taps, tile.part(from), x.data());
        kScalar.dense8(depth, outputs, plain.data(), x.data(), 0, outputs, e);
      });

  Guarded<uint8_t> one(static_cast<size_t>(depth + 63) / 64 * 64);
  for (int d = 0; d < depth; ++d) one[d] = tile.entry(taps, d, rows - 1);
  for (auto [from, to] : parts(outputs, k.output_tile)) {
    const size_t n = static_cast<size_t>(to - from);
    Canvas<int32_t> mine(n), want(n);
    k.dense8_row(depth, outputs, packed_weights.data(), one.data(), from, to, mine.data());
    kScalar.dense8_row(depth, outputs, plain.data(), one.data(), from, to, want.data());
    mine.expect(want, "dense8_row");
  }
}

void test_dense8(const Kernels& k) {
  auto draw = [&](int kernel, int channels, int outputs, Fill fill, int weights) {
    begin("draw");
    const Map m = random_map(kernel);
    int first, rows;
    random_rows(k, m, &first, &rows);
    test_dense8(k, m, channels, outputs, first, rows, fill, weights);
  };
  for (int depth = 1; depth <= 200; ++depth) {
    draw(1, depth, 1 + depth % 7, Fill::kRandom, 0);
    draw(1, depth, 1 + depth % 3, Fill::kMost, 1 + depth % 3);
  }
  for (int outputs = 1; outputs <= 70; ++outputs) {
    draw(1, pick(1, 30), outputs, Fill::kRandom, 0);
    draw(3, pick(1, 5), outputs, Fill::kRandom, 3);
  }
  for (int kernel : {2, 3, 5, 7}) {
    for (int channels = 1; channels * kernel * kernel <= 200; ++channels) {
      for (int i = 0; i < 3; ++i) draw(kernel, channels, pick(1, 9), Fill::kRandom, 0);
    }
  }
  for (int rows = 1; rows <= k.row_tile; ++rows) {
    for (int width : {7, 14, 200}) {
      const Map m{.width = width, .height = 10, .images = 1};
      test_dense8(k, m, 1 + rows % 9, 5, coin() ? 0 : m.rows() - rows, rows, Fill::kRandom, 0);
    }
  }
  for (int outputs : {96, 127, 128, 129, 192, 193, 255, 257, 320}) {
    for (int channels : {3, 16, 19, 64, 70}) draw(1, channels, outputs, Fill::kRandom, 0);
  }
  for (int channels : {512, 40}) {
    const Map m{.width = 7, .height = 7, .images = 2, .kernel = 3, .pad = 1};
    for (int weights : {0, 1, 2}) {
      test_dense8(k, m, channels, 3, 30, std::min(60, k.row_tile), Fill::kMost, weights);
    }
  }
  for (int gap : {4000, 70000}) {
    const Map m{.width = 7, .height = 7, .images = 3, .kernel = 3, .pad = 1, .gap = gap};
    test_dense8(k, m, 2, 5, 40, std::min(60, k.row_tile), Fill::kRandom, 0);
  }
}

// --- convolutions in int8 of planes of quads -----------------------------------------------------

// As Tile: four neighbouring bytes for a place of the map.
class QuadTile {
 public:
  QuadTile(const Map& m, int planes, int first, int rows, int row_tile, Fill fill)
      : tap_(static_cast<size_t>(m.taps())),
        row_(static_cast<size_t>(row_tile)),
        planes_(size(m, planes, first, rows), coin()) {
    for (int t = 0; t < m.taps(); ++t) tap_[static_cast<size_t>(t)] = 4 * m.tap(t);
    const int from = m.row(first);
    for (int r = 0; r < row_tile; ++r) {
      row_[static_cast<size_t>(r)] = 4 * (m.row(first + std::min(r, rows - 1)) - from);
    }
    for (size_t i = 0; i < planes_.size(); ++i) {
      planes_[i] = static_cast<uint8_t>(fill == Fill::kRandom ? pick(0, 127)
                                        : fill == Fill::kZero ? 0
                                                              : 127);
    }
    for (size_t i = planes_.size() - kSlack; i < planes_.size(); ++i) planes_[i] = 0xff;
    patch_ = {.planes = planes_.data(),
              .plane = 4 * m.plane(),
              .tap = tap_.data(),
              .row = row_.data(),
              .rows = rows,
              .consecutive = false};
  }
  const Patch& patch() const { return patch_; }
  Patch part(int from) const {
    Patch p = patch_;
    p.row += from;
    p.rows = std::min(kScalar.row_tile, p.rows - from);
    return p;
  }

 private:
  static size_t size(const Map& m, int planes, int first, int rows) {
    int tap = 0;
    for (int t = 0; t < m.taps(); ++t) tap = std::max(tap, m.tap(t));
    const int row = m.row(first + rows - 1) - m.row(first);
    return 4 * (static_cast<size_t>(planes - 1) * static_cast<size_t>(m.plane()) +
                static_cast<size_t>(tap + row + 1)) +
           kSlack;
  }

  std::vector<int32_t> tap_, row_;
  Guarded<uint8_t> planes_;
  Patch patch_;
};

// weights: 0 any, 1 all 127, 2 all -127, 3 one of these, 4 of a bell curve, as trained ones are
void test_conv8(const Kernels& k, const Map& m, int channels, int outputs, int first, int rows,
                Fill fill, int weights, const Mode* mode = nullptr) {
  const Conv8Shape s{.channels = channels, .taps = m.taps(), .outputs = outputs};
  begin("conv8, channels %d, outputs %d, rows %d of %d from %d, fill %d, weights %d, " MAP_FORMAT,
        channels, outputs, rows, m.rows(), first, static_cast<int>(fill), weights, MAP_VALUES(m));
  const QuadTile tile(m, (channels + 3) / 4, first, rows, k.row_tile, fill);
  Guarded<int8_t> w(static_cast<size_t>(outputs) * static_cast<size_t>(channels * s.taps));
  for (size_t i = 0; i < w.size(); ++i) {
    int v = weights == 0 ? pick(-127, 127) : weights == 1 ? 127 : weights == 2 ? -127 : 0;
    if (weights == 3) v = any_of({-127, 127});
    for (int j = 0; weights == 4 && j < 4; ++j) v += pick(-31, 31);
    w[i] = static_cast<int8_t>(v);
  }
  Canvas<uint8_t> packed(k.conv8_bytes(s)), plain(kScalar.conv8_bytes(s));
  k.pack_conv8(s, w.data(), packed.data());
  kScalar.pack_conv8(s, w.data(), plain.data());
  check(packed.intact(), "pack_conv8 wrote outside its memory");
  const Exact packed_weights(packed);
  Canvas<uint8_t> copies(k.conv8_copy_bytes(s));
  k.copy_conv8(s, tile.patch(), copies.data());
  check(copies.intact(), "copy_conv8 wrote outside its memory");
  Finish finish(mode ? *mode : random_mode(), outputs, rows);
  finish.run(
      "conv8",
      [&](const Epilogue& e) {
        for (auto [from, to] : parts(outputs, kConvOutputs)) {
          k.conv8(s, packed_weights.data(), tile.patch(), copies.data(), from, to, e);
        }
      },
      [&](int from, const Epilogue& e) {
        kScalar.conv8(s, plain.data(), tile.part(from), nullptr, 0, outputs, e);
      });
}

void test_conv8(const Kernels& k) {
  auto draw = [&](int kernel, int channels, int outputs, Fill fill, int weights) {
    begin("draw");
    const Map m = random_map(kernel);
    int first, rows;
    random_rows(k, m, &first, &rows);
    test_conv8(k, m, channels, outputs, first, rows, fill, weights);
  };
  for (int channels = 1; channels <= 40; ++channels) {
    for (int weights = 0; weights < 5; ++weights) {
      draw(3, channels, 1 + channels % 19, weights % 4 == 0 ? Fill::kRandom : Fill::kMost, weights);
    }
  }
  for (int outputs = 1; outputs <= 70; ++outputs) {
    draw(3, pick(1, 9), outputs, Fill::kRandom, 4);
    draw(any_of({1, 2, 3, 5, 11}), pick(1, 9), outputs, Fill::kMost, any_of({0, 3, 4}));
  }
  for (int rows = 1; rows <= k.row_tile; ++rows) {
    for (int width : {3, 7, 8, 14, 16, 32, 200}) {
      const Map m{.width = width, .height = 40, .images = 1, .kernel = 3, .pad = 1};
      test_conv8(k, m, 1 + rows % 9, 5, coin() ? 0 : m.rows() - rows, rows, Fill::kRandom, 4);
    }
  }
  const Map deep{.width = 7, .height = 7, .images = 2, .kernel = 3, .pad = 1};
  for (int weights = 0; weights < 5; ++weights) {
    test_conv8(k, deep, 512, 3, 30, std::min(60, k.row_tile), Fill::kMost, weights);
  }
}

// --- dense layers in float32 --------------------------------------------------------------------

// Planes (depth, row_tile) of rows from..from+n-1 of x (rows, depth); other lanes hold NaN.
Guarded<float> float_patch(const Guarded<float>& x, size_t depth, int from, int n, int row_tile) {
  const size_t tile = static_cast<size_t>(row_tile);
  Guarded<float> patch(depth * tile);
  for (size_t d = 0; d < depth; ++d) {
    for (size_t r = 0; r < tile; ++r) {
      const bool valid = r < static_cast<size_t>(n);
      patch[d * tile + r] = valid ? x[(static_cast<size_t>(from) + r) * depth + d] : kNan;
    }
  }
  return patch;
}

void test_gemm(const Kernels& k, size_t depth, int outputs, int rows, bool odd,
               const Mode* mode = nullptr) {
  begin("gemm, depth %zu, outputs %d, rows %d, odd values %d", depth, outputs, rows, odd);
  const size_t blocks = static_cast<size_t>((outputs + kGemmOutputs - 1) / kGemmOutputs);
  Guarded<float> weights(blocks * depth * kGemmOutputs), x(static_cast<size_t>(rows) * depth);
  fill_floats(weights, 4.0f);
  for (size_t i = 0; i < weights.size(); ++i) {
    const size_t block = i / (depth * kGemmOutputs);
    if (block * kGemmOutputs + i % kGemmOutputs >= static_cast<size_t>(outputs)) weights[i] = 0.0f;
  }
  fill_floats(x, 4.0f);
  if (odd) sprinkle(x);
  Mode m = mode ? *mode : random_mode();
  m.offset = false;  // offsets are for integer sums
  Finish finish(m, outputs, rows);
  const Guarded<float> patch = float_patch(x, depth, 0, rows, k.row_tile);
  finish.run(
      "gemm", [&](const Epilogue& e) { k.gemm(patch.data(), depth, weights.data(), outputs, e); },
      [&](int from, const Epilogue& e) {
        const Guarded<float> part = float_patch(x, depth, from, e.rows, kScalar.row_tile);
        kScalar.gemm(part.data(), depth, weights.data(), outputs, e);
      });
}

void test_linear(const Kernels& k, size_t depth, int outputs, size_t stride, bool odd) {
  begin("linear, depth %zu, outputs %d, stride %zu, odd values %d", depth, outputs, stride, odd);
  const size_t blocks = static_cast<size_t>((outputs + kLinearOutputs - 1) / kLinearOutputs);
  const size_t padded = blocks * kLinearOutputs;
  Guarded<float> weights(padded * depth), bias(static_cast<size_t>(outputs));
  Guarded<float> x((depth - 1) * stride + 1);
  fill_floats(weights, 4.0f);
  for (size_t i = 0; i < weights.size(); ++i) {
    const size_t m = i / (depth * kLinearOutputs) * kLinearOutputs + i % kLinearOutputs;
    if (m >= static_cast<size_t>(outputs)) weights[i] = 0.0f;
  }
  fill_floats(bias, 4.0f);
  fill_floats(x, 4.0f);
  if (odd) {
    sprinkle(x);
    sprinkle(bias);
  }
  Canvas<float> mine(padded), want(padded);
  k.linear(x.data(), stride, depth, weights.data(), bias.data(), outputs, mine.data());
  kScalar.linear(x.data(), stride, depth, weights.data(), bias.data(), outputs, want.data());
  for (int m = 0; m < outputs; ++m) {  // the padding may be anything
    if (same(mine.data()[m], want.data()[m])) continue;
    check(false, "output %d: got %a, want %a", m, static_cast<double>(mine.data()[m]),
          static_cast<double>(want.data()[m]));
    return;
  }
  check(mine.intact(), "wrote outside its memory");
}

void test_floats(const Kernels& k) {
  for (int rows = 1; rows <= k.row_tile; ++rows) {
    for (int outputs : {1, 3, 4, 5, 17}) {
      test_gemm(k, static_cast<size_t>(1 + (rows * 7 + outputs) % 30), outputs, rows, false);
    }
  }
  for (int outputs = 1; outputs <= 70; ++outputs) {
    test_gemm(k, static_cast<size_t>(1 + outputs % 11), outputs, 1 + outputs % k.row_tile, false);
  }
  for (size_t depth : {1, 2, 3, 27, 64, 147, 300}) {
    test_gemm(k, depth, 6, k.row_tile, false);
    test_gemm(k, depth, 4, k.row_tile, true);
  }
  for (int outputs : {1, 2, 7, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 127, 128, 129, 200}) {
    for (size_t depth : {1, 2, 5, 33}) {
      for (size_t stride : {1, 3}) {
        for (bool odd : {false, true}) test_linear(k, depth, outputs, stride, odd);
      }
    }
  }
}

}  // namespace
}  // namespace lutra
