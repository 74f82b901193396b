// The part of kernels_test.cc about depthwise layers.
#pragma once

#include "kernel_cases.h"

namespace lutra {
namespace {

// The taps of a tile anywhere in a plane, with any masks.
struct DepthwiseCase {
  DepthwiseShape shape;
  int rows, plane_size;
  std::vector<int32_t> offset;
  std::vector<uint64_t> valid;

  DepthwiseCase(int row, int lines, int gap, int step, int multiplier, int rows_)
      : shape{.taps = row * lines, .row = row, .gap = gap, .step = step, .multiplier = multiplier},
        rows(rows_) {
    int most = 0;
    for (int t = 0; t < shape.taps; ++t) {
      const bool begins = t % row == 0 || gap == 0;
      offset.push_back(begins ? pick(0, 90) : offset.back() + gap);
      most = std::max(most, offset.back());
    }
    plane_size = most + kMaxRowTile * step + 64;
    const int kind = pick(0, 2);  // all, some, few
    for (int t = 0; t < shape.taps; ++t) {
      uint64_t mask = ~uint64_t{0};
      for (int i = 0; i < kind; ++i) mask &= uint64_t{random_bits()} << 32 ^ random_bits();
      valid.push_back(rows == 64 ? mask : mask & ((uint64_t{1} << rows) - 1));
    }
  }
  const uint8_t* masks(std::vector<uint64_t>* kept, int from) const {
    *kept = valid;
    for (uint64_t& mask : *kept) mask >>= from;
    return reinterpret_cast<const uint8_t*>(kept->data());
  }
};

#define DEPTHWISE_FORMAT \
  "taps %d in rows of %d, gap %d, step %d, multiplier %d, outputs %d, rows %d"
#define DEPTHWISE_VALUES(c, outputs)                                                           \
  (c).shape.taps, (c).shape.row, (c).shape.gap, (c).shape.step, (c).shape.multiplier, outputs, \
      (c).rows

void test_depthwise8(const Kernels& k, const DepthwiseCase& c, int planes, bool extreme) {
  const int outputs = planes * c.shape.multiplier;
  begin("depthwise8, " DEPTHWISE_FORMAT, DEPTHWISE_VALUES(c, outputs));
  const uint8_t zero = coin() ? 0 : static_cast<uint8_t>(pick(0, 127));
  Guarded<uint8_t> x(static_cast<size_t>(planes) * c.plane_size);
  for (size_t i = 0; i < x.size(); ++i) x[i] = extreme ? 127 : static_cast<uint8_t>(pick(0, 127));
  Guarded<int8_t> w(static_cast<size_t>(outputs) * c.shape.taps);
  const int8_t side = coin() ? 127 : -127;
  for (size_t i = 0; i < w.size(); ++i)
    w[i] = extreme ? side : static_cast<int8_t>(pick(-127, 127));
  Canvas<uint8_t> packed(k.depthwise8_bytes(c.shape, outputs));
  Canvas<uint8_t> plain(kScalar.depthwise8_bytes(c.shape, outputs));
  k.pack_depthwise8(c.shape, outputs, w.data(), packed.data());
  kScalar.pack_depthwise8(c.shape, outputs, w.data(), plain.data());
  check(packed.intact(), "pack_depthwise8 wrote outside its memory");
  const size_t mask_bytes = k.depthwise8_mask_bytes(c.shape);
  std::vector<uint8_t> memory(mask_bytes + 64);
  uint8_t* const masks = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
  k.pack_depthwise8_masks(c.shape, c.valid.data(), masks);
  std::vector<uint64_t> kept;
  DepthwiseTile<uint8_t> tile{x.data(), c.plane_size, c.offset.data(), masks, zero};
  Finish finish(random_mode(), outputs, c.rows);
  finish.run(
      "depthwise8",
      [&](const Epilogue& e) {
        for (auto [from, to] : parts(outputs, 1)) {
          k.depthwise8(c.shape, packed.data(), tile, from, to, e);
        }
      },
      [&](int from, const Epilogue& e) {
        DepthwiseTile<uint8_t> part = tile;
        part.planes += from * c.shape.step;
        part.masks = c.masks(&kept, from);
        kScalar.depthwise8(c.shape, plain.data(), part, 0, outputs, e);
      });
}

void test_depthwise_floats(const Kernels& k, const DepthwiseCase& c, int planes) {
  const int outputs = planes * c.shape.multiplier;
  begin("depthwise, " DEPTHWISE_FORMAT, DEPTHWISE_VALUES(c, outputs));
  Guarded<float> x(static_cast<size_t>(planes) * c.plane_size);
  fill_floats(x, 3.0f);
  Guarded<float> w(static_cast<size_t>(outputs) * c.shape.taps);
  fill_floats(w, 1.0f);
  std::vector<uint64_t> all, kept;
  DepthwiseTile<float> tile{x.data(), c.plane_size, c.offset.data(), c.masks(&all, 0), 0.0f};
  Mode mode = random_mode();
  mode.offset = false;
  Finish finish(mode, outputs, c.rows);
  finish.run(
      "depthwise",
      [&](const Epilogue& e) {
        for (auto [from, to] : parts(outputs, 1)) {
          k.depthwise(c.shape, w.data(), tile, from, to, e);
        }
      },
      [&](int from, const Epilogue& e) {
        DepthwiseTile<float> part = tile;
        part.planes += from;
        part.masks = c.masks(&kept, from);
        kScalar.depthwise(c.shape, w.data(), part, 0, outputs, e);
      });
}

void test_depthwise(const Kernels& k) {
  for (int rows = 1; rows <= k.row_tile; ++rows) {
    for (int kernel : {3, 5}) {
      for (int step : {1, 2}) {
        test_depthwise8(k, DepthwiseCase(kernel, kernel, 1, step, 1, rows), 3, false);
      }
      test_depthwise_floats(k, DepthwiseCase(kernel, kernel, 1, 1, 1, rows), 3);
    }
  }
  for (int i = 0; i < 400; ++i) {
    const int row = pick(1, 9), lines = pick(1, 9), gap = pick(0, 5), rows = pick(1, k.row_tile);
    const DepthwiseCase c(row, lines, gap, pick(1, 2), pick(1, 3), rows);
    test_depthwise8(k, c, pick(1, 4), i % 4 == 0);
    test_depthwise_floats(k, DepthwiseCase(row, lines, gap, 1, pick(1, 3), rows), pick(1, 4));
  }
  test_depthwise8(k, DepthwiseCase(kMaxDepthwiseTaps, 1, 0, 1, 1, k.row_tile), 2, true);
  test_depthwise8(k, DepthwiseCase(1, kMaxDepthwiseTaps, 1, 2, 1, k.row_tile), 2, true);
}

}  // namespace
}  // namespace lutra
