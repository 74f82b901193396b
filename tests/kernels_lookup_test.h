// The part of kernels_test.cc about lookup layers.
#pragma once

#include "kernel_cases.h"

namespace lutra {
namespace {

enum class Responses { kRandom, kMost, kLeast, kAlternate, kSmall, kProducts, kZero };
constexpr int kResponseKinds = 7;

struct LookupCase {
  LookupShape shape;
  Map map;
  int first, rows;
  Fill fill = Fill::kRandom;
  Responses table = Responses::kRandom;
  int zero_row = -1;  // as trained tables have one
  int weight = -1;    // the only one there is, or -1: all
};

Guarded<int8_t> make_responses(const LookupCase& c) {
  const LookupShape& s = c.shape;
  Guarded<int8_t> t(static_cast<size_t>(s.levels) * static_cast<size_t>(s.weights), coin());
  for (int i = 0; i < s.levels; ++i) {
    for (int w = 0; w < s.weights; ++w) {
      int v = 0;
      if (c.table == Responses::kRandom) v = pick(-127, 127);
      if (c.table == Responses::kMost) v = 127;
      if (c.table == Responses::kLeast) v = -127;
      if (c.table == Responses::kAlternate) v = (i + w) % 2 == 0 ? 127 : -127;
      if (c.table == Responses::kSmall) v = pick(-15, 15);
      if (c.table == Responses::kProducts) {
        const int zero = std::max(c.zero_row, 0);
        v = std::clamp((i - zero) * (w - s.weights / 2), -127, 127);
      }
      if (i == c.zero_row) v = 0;
      t[static_cast<size_t>(i * s.weights + w)] = static_cast<int8_t>(v);
    }
  }
  return t;
}

void test_respond(const Kernels& k, const LookupCase& c, const Mode* mode = nullptr) {
  const LookupShape& s = c.shape;
  begin(
      "lookup layer, depth %d, taps %d, outputs %d, levels %d, weights %d, rows %d of %d from %d, "
      "fill %d, table %d, zero row %d, weight %d, " MAP_FORMAT,
      s.depth, s.taps, s.outputs, s.levels, s.weights, c.rows, c.map.rows(), c.first,
      static_cast<int>(c.fill), static_cast<int>(c.table), c.zero_row, c.weight, MAP_VALUES(c.map));
  const Tile tile(c.map, s.depth, c.first, c.rows, k.row_tile, s.levels - 1, c.fill);
  Canvas<uint8_t> gathered(k.index_bytes(s));
  std::memset(gathered.data(), any_of({0, 0x3f, 0xff}), gathered.size());
  k.gather_indices(s, tile.patch(), gathered.data());
  check(gathered.intact(), "gather_indices wrote outside its memory");
  const Exact indices(gathered);

  const Guarded<int8_t> table = make_responses(c);
  Guarded<uint8_t> weight(static_cast<size_t>(s.depth) * static_cast<size_t>(s.outputs), coin());
  fill_integers(weight, c.weight < 0 ? 0 : c.weight, c.weight < 0 ? s.weights - 1 : c.weight);
  Canvas<uint8_t> packed(k.response_bytes(s)), plain(kScalar.response_bytes(s));
  k.pack_responses(s, table.data(), weight.data(), packed.data());
  kScalar.pack_responses(s, table.data(), weight.data(), plain.data());
  check(packed.intact(), "pack_responses wrote outside its memory");
  const Exact responses(packed);
  Finish finish(mode ? *mode : random_mode(), s.outputs, c.rows);
  finish.run(
      "respond",
      [&](const Epilogue& e) {
        for (auto [from, to] : parts(s.outputs, k.output_tile)) {
          k.respond(s, responses.data(), indices.data(), from, to, e);
        }
      },
      [&](int from, const Epilogue& e) {
        std::vector<uint8_t> x(kScalar.index_bytes(s));
        kScalar.gather_indices(s, tile.part(from), x.data());
        kScalar.respond(s, plain.data(), x.data(), 0, s.outputs, e);
      });

  if (s.taps != 1) return;
  Guarded<uint8_t> one(static_cast<size_t>(s.depth), coin());
  for (int d = 0; d < s.depth; ++d) one[static_cast<size_t>(d)] = tile.entry(1, d, c.rows - 1);
  for (auto [from, to] : parts(s.outputs, k.output_tile)) {
    const size_t n = static_cast<size_t>(to - from);
    Canvas<int32_t> mine(n), want(n);
    k.respond_row(s, responses.data(), one.data(), from, to, mine.data());
    kScalar.respond_row(s, plain.data(), one.data(), from, to, want.data());
    mine.expect(want, "respond_row");
  }
}

// A layer over `channels` planes of a random map.
LookupCase random_lookup(const Kernels& k, int kernel, int channels, int outputs) {
  LookupCase c;
  c.map = random_map(kernel);
  random_rows(k, c.map, &c.first, &c.rows);
  c.shape = {.depth = channels * c.map.taps(),
             .taps = c.map.taps(),
             .outputs = outputs,
             .levels = any_of({4, 4, 8, 16, 16, 32, 64}),
             .weights = any_of({3, 3, 5, 7, 9, 15, 15, 17, 31, 33})};
  c.fill = any_of({Fill::kRandom, Fill::kRandom, Fill::kZero, Fill::kMost});
  c.table = static_cast<Responses>(pick(0, kResponseKinds - 1));
  c.zero_row = any_of({-1, 0, c.shape.levels / 2});
  if (pick(0, 4) == 0) c.weight = pick(0, c.shape.weights - 1);
  return c;
}

void test_respond(const Kernels& k) {
  for (int levels : {4, 8, 16, 32, 64}) {
    for (int weights : {2, 3, 4, 5, 7, 8, 9, 11, 15, 16, 17, 31, 32, 33}) {
      for (int table = 0; table < kResponseKinds; ++table) {
        for (int zero_row : {-1, 0, levels / 2}) {
          begin("draw");
          LookupCase c = random_lookup(k, any_of({1, 3}), pick(1, 9), pick(1, 9));
          c.shape.levels = levels;
          c.shape.weights = weights;
          c.table = static_cast<Responses>(table);
          c.zero_row = zero_row;
          c.weight = -1;
          test_respond(k, c);
        }
      }
    }
  }
  auto draw = [&](int kernel, int channels, int outputs) {
    begin("draw");
    test_respond(k, random_lookup(k, kernel, channels, outputs));
  };
  for (int depth = 1; depth <= 80; ++depth) {
    draw(1, depth, 1 + depth % 7);
    draw(1, depth, pick(1, 5));
  }
  for (int outputs = 1; outputs <= 70; ++outputs) {
    draw(1, pick(1, 30), outputs);
    draw(3, pick(1, 5), outputs);
  }
  for (int outputs : {96, 127, 128, 129, 192, 193, 255, 257, 320}) {
    for (int channels : {3, 16, 19, 64}) draw(1, channels, outputs);
  }
  for (int kernel : {2, 3, 5, 7}) {
    for (int channels = 1; channels * kernel * kernel <= 150; ++channels) {
      for (int i = 0; i < 3; ++i) draw(kernel, channels, pick(1, 6));
    }
  }
  for (int rows = 1; rows <= k.row_tile; ++rows) {
    for (int width : {7, 14, 200}) {
      begin("draw");
      LookupCase c = random_lookup(k, 1, 1 + rows % 9, 5);
      c.map = {.width = width, .height = 10, .images = 1};
      c.rows = rows;
      c.first = coin() ? 0 : c.map.rows() - rows;
      test_respond(k, c);
    }
  }
  for (int gap : {4000, 70000}) {
    for (int levels : {4, 16, 64}) {
      begin("draw");
      LookupCase c = random_lookup(k, 3, 3, 5);
      c.map = {.width = 7, .height = 7, .images = 3, .kernel = 3, .pad = 1, .gap = gap};
      c.shape.levels = levels;
      c.rows = std::min(60, k.row_tile);
      c.first = 40;
      test_respond(k, c);
    }
  }
}

// Sums that fill every accumulator, around the lengths at which they are emptied.
void test_long_responses(const Kernels& k) {
  for (int depth : {255, 256, 257, 258, 511, 512, 513, 514, 515, 1028, 1029, 2056, 2057, 2100}) {
    for (int levels : {4, 8, 16, 32, 64}) {
      for (Responses table : {Responses::kAlternate, Responses::kMost, Responses::kLeast,
                              Responses::kSmall, Responses::kProducts}) {
        begin("draw");
        LookupCase c;
        c.shape = {.depth = depth,
                   .taps = 1,
                   .outputs = pick(1, 5),
                   .levels = levels,
                   .weights = any_of({3, 15, 33})};
        c.map = {.width = 70, .height = 1, .images = 1};
        c.rows = any_of({3, std::min(20, k.row_tile), k.row_tile});
        c.first = pick(0, 70 - c.rows);
        c.fill = any_of({Fill::kZero, Fill::kMost, Fill::kRandom});
        c.table = table;
        c.zero_row = any_of({-1, 0});
        if (coin()) c.weight = any_of({0, c.shape.weights - 1});
        test_respond(k, c);
      }
    }
  }
}

// Small integers: their sums are the same in any order.
void test_response_grad(const Kernels& k, size_t n, int levels) {
  begin("response_grad, %zu elements, %d levels", n, levels);
  Guarded<float> x(n, coin());
  Guarded<uint8_t> index(n, coin());
  Canvas<float> mine(1, n, n, static_cast<size_t>(pick(0, 3))), want(n);
  for (size_t i = 0; i < n; ++i) {
    x[i] = static_cast<float>(pick(-12, 12)) * 0.5f;
    if (pick(0, 9) == 0) x[i] = any_of({kNan, kInf, -kInf, -0.0f});
    const bool beyond = levels < 256 && pick(0, 30) == 0;  // is not counted
    index[i] = static_cast<uint8_t>(beyond ? pick(levels, 255) : pick(0, levels - 1));
    mine.data()[i] = want.data()[i] = static_cast<float>(pick(-8, 8));
  }
  const float low = any_of({0.0f, -3.0f}), high = any_of({2.5f, 4.0f});
  const size_t cells = static_cast<size_t>(levels);
  Canvas<double> my_cells(cells), cells_wanted(cells);
  Canvas<int64_t> my_counts(cells), counts_wanted(cells);
  for (size_t i = 0; i < cells; ++i) {
    my_cells.data()[i] = cells_wanted.data()[i] = pick(-5, 5);
    my_counts.data()[i] = counts_wanted.data()[i] = pick(0, 5);
  }
  double inside[2] = {7.0, 7.0};
  k.response_grad(x.data(), index.data(), mine.data(), n, low, high, levels, my_cells.data(),
                  my_counts.data(), &inside[0]);
  kScalar.response_grad(x.data(), index.data(), want.data(), n, low, high, levels,
                        cells_wanted.data(), counts_wanted.data(), &inside[1]);
  my_cells.expect(cells_wanted, "cells");
  my_counts.expect(counts_wanted, "counts");
  check(inside[0] == inside[1], "inside is %.9g, not %.9g", inside[0], inside[1]);
  for (size_t i = 0; i < n; ++i) {  // 0 and -0 are both zero
    if (mine.data()[i] == want.data()[i]) continue;
    check(false, "gradient %zu is %.9g, not %.9g", i, static_cast<double>(mine.data()[i]),
          static_cast<double>(want.data()[i]));
    break;
  }
  check(mine.intact(), "wrote outside its memory");
}

void test_response_grad(const Kernels& k) {
  for (int levels : {1, 4, 8, 16, 32, 64, 256}) {
    for (size_t n = 0; n <= 140; n += n < 70 ? 1 : 7) test_response_grad(k, n, levels);
    for (size_t n : {2047, 2048, 2049, 4096, 5000}) test_response_grad(k, n, levels);
  }
}

}  // namespace
}  // namespace lutra
