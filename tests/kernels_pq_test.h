// The part of kernels_test.cc about product quantisation.
#pragma once

#include "kernel_cases.h"

namespace lutra {
namespace {

enum class Tables { kRandom, kMost, kLeast, kGauss, kBytes };

struct PqCase {
  PqShape shape;
  Map map;
  int first, rows;
  Fill fill = Fill::kRandom;
  int encoder = 0;  // what the encoder consists of: 0: random, 1: ties, 2: the largest, 3: zeros
  Tables tables = Tables::kRandom;
};

const char* encoder_name(const PqShape& s) {
  if (s.encoder == Encoder::kTree) return "tree";
  return s.distance == Distance::kL2   ? "nearest"
         : s.distance == Distance::kL1 ? "nearest by l1"
                                       : "nearest by chebyshev";
}

void begin_pq(const PqCase& c, const char* what) {
  const PqShape& s = c.shape;
  begin(
      "%s, %s %d, depth %d, taps %d, codebooks %d, K %d, V %d, outputs %d, bits %d, rows %d of %d "
      "from %d, fill %d, tables %d, " MAP_FORMAT,
      what, encoder_name(s), c.encoder, s.depth, s.taps, s.codebooks, s.centroids, s.dim, s.outputs,
      s.bits, c.rows, c.map.rows(), c.first, static_cast<int>(c.fill), static_cast<int>(c.tables),
      MAP_VALUES(c.map));
}

int levels(const PqShape& s) {
  int n = 0;
  while ((1 << n) < s.centroids) ++n;
  return n;
}

Guarded<int8_t> make_tables(const PqShape& s, Tables kind) {
  Guarded<int8_t> t(static_cast<size_t>(s.codebooks) * s.centroids * s.outputs);
  for (size_t i = 0; i < t.size(); ++i) {
    int v = 0;
    if (kind == Tables::kRandom) v = pick(-127, 127);
    if (kind == Tables::kMost) v = 127;
    if (kind == Tables::kLeast) v = -127;
    if (kind == Tables::kGauss) v = pick(-21, 21) + pick(-21, 21) + pick(-21, 21);
    if (kind == Tables::kBytes) v = any_of({-128, -128, -128, 127});
    t[i] = static_cast<int8_t>(v);
  }
  return t;
}

// The packed encoders of the kernels on trial and of the scalar ones.
void pack_encoder(const Kernels& k, const PqCase& c, Canvas<uint8_t>& mine, Canvas<uint8_t>& want) {
  const PqShape& s = c.shape;
  const int qmax = (1 << s.bits) - 1;
  const size_t codebooks = static_cast<size_t>(s.codebooks);
  auto value = [&] { return c.encoder == 2 ? qmax : c.encoder == 3 ? 0 : pick(0, qmax); };
  if (s.encoder == Encoder::kNearest) {
    const size_t dim = static_cast<size_t>(s.dim), centroids = static_cast<size_t>(s.centroids);
    Guarded<uint8_t> v(codebooks * centroids * dim);
    for (size_t i = 0; i < v.size(); ++i) v[i] = static_cast<uint8_t>(value());
    if (c.encoder == 1) {  // few different centroids: most scores occur several times
      for (size_t row = 0; row < codebooks * centroids; ++row) {
        const size_t from = row / centroids * centroids + random_bits() % 3;
        std::memmove(&v[row * dim], &v[from * dim], dim);
      }
    }
    k.pack_nearest(s, v.data(), mine.data());
    kScalar.pack_nearest(s, v.data(), want.data());
    return;
  }
  Guarded<int32_t> splits(codebooks * static_cast<size_t>(levels(s)));
  fill_integers(splits, 0, s.depth - 1);
  Guarded<uint8_t> thresholds(codebooks * static_cast<size_t>(s.centroids - 1));
  for (size_t i = 0; i < thresholds.size(); ++i) {
    thresholds[i] = static_cast<uint8_t>(c.encoder == 1 ? pick(0, 255) : value());
  }
  k.pack_tree(s, splits.data(), thresholds.data(), mine.data());
  kScalar.pack_tree(s, splits.data(), thresholds.data(), want.data());
}

void test_lookup_row(const Kernels& k, const PqShape& s, const Guarded<int8_t>& tables,
                     const Canvas<uint8_t>& codes, size_t code_stride, int row) {
  Guarded<uint8_t> one(static_cast<size_t>(s.codebooks));
  for (size_t b = 0; b < one.size(); ++b) one[b] = codes.data()[b * code_stride + row];
  for (auto [first, last] : parts(s.outputs, k.output_tile)) {
    const size_t n = static_cast<size_t>(last - first);
    Canvas<int32_t> mine(n), want(n);
    k.lookup_row(s, tables.data(), one.data(), first, last, mine.data());
    kScalar.lookup_row(s, tables.data(), one.data(), first, last, want.data());
    mine.expect(want, "lookup_row");
  }
}

// The sums of a tile of codes in parts, and what becomes of them. lookup(table, first, last,
// epilogue) are the kernels on trial; `plain` are the codes of the scalar ones, tile after tile.
template <class Lookup>
void test_sums(const Kernels& k, const PqCase& c, const PqShape& s, const Guarded<int8_t>& tables,
               const char* name, const std::vector<uint8_t>& plain, const Mode& mode,
               const Lookup& lookup) {
  Canvas<uint8_t> table(k.table_bytes(s)), plain_table(kScalar.table_bytes(s));
  k.pack_tables(s, tables.data(), table.data());
  kScalar.pack_tables(s, tables.data(), plain_table.data());
  check(table.intact(), "pack_tables wrote outside its memory");
  const Exact packed_table(table);
  Finish finish(mode, s.outputs, c.rows);
  finish.run(
      name,
      [&](const Epilogue& e) {
        for (auto [first, last] : parts(s.outputs, k.output_tile)) {
          lookup(packed_table.data(), first, last, e);
        }
      },
      [&](int from, const Epilogue& e) {
        const size_t i = static_cast<size_t>(from / kScalar.row_tile);
        kScalar.lookup(s, plain_table.data(), plain.data() + kScalar.code_bytes(s) * i, 0,
                       s.outputs, e);
      });
}

void test_sums(const Kernels& k, const PqCase& c, const PqShape& s, const Guarded<int8_t>& tables,
               const uint8_t* codes, const std::vector<uint8_t>& plain, const Mode& mode) {
  test_sums(k, c, s, tables, "lookup", plain, mode,
            [&](const uint8_t* table, int first, int last, const Epilogue& e) {
              k.lookup(s, table, codes, first, last, e);
            });
}

// Planes of units of codes, from a tile's planes of codes.
struct Units {
  std::vector<int32_t> tap, row;
  Guarded<uint8_t> planes;
  Patch patch;

  Units(const Kernels& k, const PqShape& s, const Tile& tile, int unit)
      : tap(static_cast<size_t>(s.parts)),
        row(static_cast<size_t>(k.row_tile)),
        planes(static_cast<size_t>(s.codebooks / s.parts * tile.span(s.parts)) + kSlack, coin()) {
    const Patch& p = tile.patch();
    const int codebooks = s.codebooks / s.parts, span = tile.span(s.parts);
    PqShape part = s;
    part.parts = part.taps = 1;
    part.codebooks = codebooks;
    std::vector<int32_t> rows(static_cast<size_t>(k.row_tile));
    const int32_t none = 0;
    for (int first = 0; first < span; first += k.row_tile) {
      const int count = std::min(k.row_tile, span - first);
      for (int r = 0; r < k.row_tile; ++r) rows[r] = std::min(r, count - 1);
      Canvas<uint8_t> codes(k.code_bytes(part));
      const Patch pixels{p.planes + first, p.plane, &none, rows.data(), count, true};
      k.gather_codes(part, pixels, 0, codebooks, codes.data());
      const auto unpack = unit == 1 ? k.unpack_codes : k.unpack_units;
      unpack(part, codes.data(), count, planes.data() + first * unit,
             static_cast<size_t>(span) * static_cast<size_t>(unit));
    }
    for (int t = 0; t < s.parts; ++t) tap[t] = p.tap[t] * unit;
    for (int r = 0; r < k.row_tile; ++r) row[r] = p.row[r] * unit;
    patch = {planes.data(), int64_t{span} * unit,      tap.data(), row.data(),
             p.rows,        p.consecutive && unit == 1};
  }
};

// Where blocks of 16 rows of a patch of units begin; none if one of them is not consecutive.
std::vector<int32_t> unit_blocks(const Patch& p, int unit) {
  std::vector<int32_t> block;
  for (int r = 0; r < p.rows; ++r) {
    if (r % kRowBlock == 0) block.push_back(p.row[r]);
    if (p.row[r] != block.back() + r % kRowBlock * unit) return {};
  }
  return block;
}

// Codes that were made before, and their planes: gathers those of a tile in parts, unpacks them,
// and looks them up.
void test_gather_codes(const Kernels& k, const PqCase& c) {
  begin_pq(c, "gather_codes");
  PqShape s = c.shape;
  s.codebooks = s.depth;  // an entry of a row is a code
  s.parts = s.taps;
  s.outputs = std::min(s.outputs, 5);
  const Tile tile(c.map, s.depth, c.first, c.rows, k.row_tile, s.centroids - 1, c.fill);
  const Units units(k, s, tile, k.code_unit(s));
  Canvas<uint8_t> codes(k.code_bytes(s));
  std::memset(codes.data(), any_of({0, 0x3f, 0xa5, 0xff}), codes.size());
  for (auto [first, last] : parts(s.codebooks, k.codebook_tile)) {
    k.gather_codes(s, units.patch, first, last, codes.data());
  }
  if (!check(codes.intact(), "gather_codes wrote outside its memory")) return;
  const size_t codebooks = static_cast<size_t>(s.codebooks), rows = static_cast<size_t>(c.rows);
  Canvas<uint8_t> mine(codebooks, rows, rows, 0), want(codebooks, rows, rows, 0);
  for (int b = 0; b < s.codebooks; ++b) {
    for (int r = 0; r < c.rows; ++r) {
      want.data()[static_cast<size_t>(b) * rows + static_cast<size_t>(r)] =
          tile.entry(s.taps, b, r);
    }
  }
  k.unpack_codes(s, codes.data(), c.rows, mine.data(), rows);
  const int before = failed;
  mine.expect(want, "gathered codes (plane = codebook)");
  if (failed != before) return;
  const size_t plain_bytes = kScalar.code_bytes(s);
  const int chunks = (c.rows + kScalar.row_tile - 1) / kScalar.row_tile;
  std::vector<uint8_t> plain(plain_bytes * static_cast<size_t>(chunks));
  for (int i = 0; i < chunks; ++i) {
    kScalar.gather_codes(s, tile.part(i * kScalar.row_tile), 0, s.codebooks,
                         plain.data() + plain_bytes * static_cast<size_t>(i));
  }
  const Guarded<int8_t> tables = make_tables(s, c.tables);
  test_sums(k, c, s, tables, codes.data(), plain, random_mode());
  const int unit = k.code_unit(s);
  const std::vector<int32_t> block = unit_blocks(units.patch, unit);
  if (block.empty() || !k.reads_units || !k.reads_units(s)) return;
  Guarded<int64_t> offset(static_cast<size_t>(s.codebooks / unit) + 1);
  for (int i = 0; i < s.codebooks / unit; ++i) {
    offset[static_cast<size_t>(i)] = i / s.parts * units.patch.plane + units.tap[i % s.parts];
  }
  offset[offset.size() - 1] = offset[0];
  test_sums(k, c, s, tables, "lookup_units", plain, random_mode(),
            [&](const uint8_t* table, int first, int last, const Epilogue& e) {
              const CodeTile where{units.patch.planes, offset.data(), block.data()};
              k.lookup_units(s, table, where, first, last, e);
            });
}

// Encodes a tile in parts, unpacks its codes, looks them up in parts, and one row by itself.
void test_pq(const Kernels& k, const PqCase& c, const Mode* mode = nullptr) {
  begin_pq(c, "pq");
  const PqShape& s = c.shape;
  Canvas<uint8_t> encoder(k.encoder_bytes(s)), plain_encoder(kScalar.encoder_bytes(s));
  pack_encoder(k, c, encoder, plain_encoder);
  check(encoder.intact(), "pack_nearest or pack_tree wrote outside its memory");
  const Exact packed_encoder(encoder);
  const Tile tile(c.map, s.depth, c.first, c.rows, k.row_tile, (1 << s.bits) - 1, c.fill);

  Canvas<uint8_t> codes(k.code_bytes(s));
  std::memset(codes.data(), any_of({0, 0x3f, 0xa5, 0xff}), codes.size());
  for (auto [first, last] : parts(s.codebooks, k.codebook_tile)) {
    k.encode(s, packed_encoder.data(), tile.patch(), first, last, codes.data());
  }
  if (!check(codes.intact(), "encode wrote outside its memory")) return;
  const size_t plain_bytes = kScalar.code_bytes(s);
  const int chunks = (c.rows + kScalar.row_tile - 1) / kScalar.row_tile;
  std::vector<uint8_t> plain_codes(plain_bytes * static_cast<size_t>(chunks));
  const size_t stride = static_cast<size_t>(c.rows + any_of({0, 1, 40}));
  const size_t codebooks = static_cast<size_t>(s.codebooks), rows = static_cast<size_t>(c.rows);
  const size_t shift = static_cast<size_t>(pick(0, 9));
  Canvas<uint8_t> mine(codebooks, stride, rows, shift), want(codebooks, stride, rows, shift);
  for (int i = 0; i < chunks; ++i) {
    uint8_t* const to = plain_codes.data() + plain_bytes * static_cast<size_t>(i);
    const Patch part = tile.part(i * kScalar.row_tile);
    kScalar.encode(s, plain_encoder.data(), part, 0, s.codebooks, to);
    kScalar.unpack_codes(s, to, part.rows, want.data() + i * kScalar.row_tile, stride);
  }
  const Exact packed_codes(codes);
  k.unpack_codes(s, packed_codes.data(), c.rows, mine.data(), stride);
  const int before = failed;
  mine.expect(want, "codes (plane = codebook)");
  if (failed != before) return;  // the sums would be wrong with them

  const Guarded<int8_t> tables = make_tables(s, c.tables);
  test_sums(k, c, s, tables, packed_codes.data(), plain_codes, mode ? *mode : random_mode());
  test_lookup_row(k, s, tables, want, stride, pick(0, c.rows - 1));
  test_gather_codes(k, c);
}

// About `codebooks` codebooks of `dim` on a random map; the last sub-vector is often cut off.
PqCase random_pq(const Kernels& k, Encoder encoder, int centroids, int dim, int codebooks,
                 int bits) {
  PqCase c;
  c.map = random_map(any_of({1, 1, 2, 3, 3, 5, 7}));
  random_rows(k, c.map, &c.first, &c.rows);
  const int taps = c.map.taps();
  const int missing = coin() ? pick(0, dim - 1) : 0;
  const int depth = std::max(1, (codebooks * dim - missing) / taps) * taps;
  c.shape = {.depth = depth,
             .taps = taps,
             .codebooks = (depth + dim - 1) / dim,
             .centroids = centroids,
             .dim = dim,
             .outputs = pick(1, 9),
             .bits = bits,
             .encoder = encoder};
  c.encoder = pick(0, 1);
  return c;
}

// A case of the nearest centroid by every distance.
void test_nearest(const Kernels& k, PqCase c) {
  for (Distance distance : {Distance::kL2, Distance::kL1, Distance::kChebyshev}) {
    c.shape.distance = distance;
    test_pq(k, c);
  }
}

void test_encode(const Kernels& k) {
  for (int dim : {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 15, 16, 17,
                  18, 19, 20, 23, 24, 25, 27, 31, 32, 33, 36, 47, 48, 49, 63, 64}) {
    for (int centroids : {8, 16, 32, 64}) {
      begin("draw");
      const int most = std::min(2 * k.codebook_tile + 1, std::max(2, 160 / dim));
      test_nearest(k, random_pq(k, Encoder::kNearest, centroids, dim, pick(1, most), pick(1, 7)));
      begin("draw");
      PqCase c = random_pq(k, Encoder::kNearest, centroids, dim, pick(1, 2), 7);
      c.fill = any_of({Fill::kRandom, Fill::kZero, Fill::kMost});
      c.encoder = pick(1, 3);
      test_nearest(k, c);
      begin("draw");
      c = random_pq(k, Encoder::kNearest, centroids, dim, 2, 7);
      c.map = {.width = 14, .height = 14, .images = 1};
      c.first = pick(0, 196 - c.rows);
      c.shape.depth = 2 * dim;
      c.shape.taps = 1;
      c.shape.codebooks = 2;
      test_nearest(k, c);
    }
  }
  for (int centroids : {8, 16, 32, 64}) {
    for (int bits = 1; bits <= 7; ++bits) {
      for (int fill = 0; fill < 3; ++fill) {
        for (int values = 0; values < 4; ++values) {
          for (Encoder encoder : {Encoder::kNearest, Encoder::kTree}) {
            begin("draw");
            PqCase c = random_pq(k, encoder, centroids, any_of({4, 9}), 3, bits);
            c.fill = static_cast<Fill>(fill);
            c.encoder = values;
            test_nearest(k, c);
          }
        }
      }
    }
  }
}

// Maps that tiles cross in every way: rows, images, far images, phases.
void test_maps(const Kernels& k) {
  for (int width : {4, 7, 8, 14, 16, 28, 32, 56}) {
    for (int kernel : {1, 3, 5, 7}) {
      for (int stride : {1, 2}) {
        for (Encoder encoder : {Encoder::kNearest, Encoder::kTree}) {
          begin("draw");
          Map m{.width = width,
                .height = width < 16 ? width : 5,
                .images = pick(1, 4),
                .kernel = kernel,
                .stride = stride,
                .pad = kernel / 2,
                .gap = any_of({0, 0, 17, 4000, 70000})};
          const int channels = kernel == 1 ? 20 : any_of({2, 4}), depth = channels * m.taps();
          const int dim = any_of({3, 4, 8, 9, 16});
          const int total = m.rows(), most = std::min(k.row_tile, total);
          const PqShape s{.depth = depth,
                          .taps = m.taps(),
                          .codebooks = (depth + dim - 1) / dim,
                          .centroids = any_of({8, 16, 16, 32, 64}),
                          .dim = dim,
                          .outputs = 3,
                          .bits = 7,
                          .encoder = encoder,
                          .distance = any_of({Distance::kL2, Distance::kL1, Distance::kChebyshev})};
          // the last tile, one across the end of an image, and one of a few rows
          const int image = std::min(total - most, m.out_h() * m.out_w() * (m.images / 2));
          test_pq(k, {.shape = s, .map = m, .first = total - most, .rows = most});
          test_pq(k, {.shape = s, .map = m, .first = std::max(0, image - 9), .rows = most});
          const int few = pick(1, most);
          test_pq(k, {.shape = s, .map = m, .first = pick(0, total - few), .rows = few});
        }
      }
    }
  }
}

void test_rows(const Kernels& k) {
  for (int rows = 1; rows <= k.row_tile; ++rows) {
    for (Encoder encoder : {Encoder::kNearest, Encoder::kTree}) {
      for (int width : {7, 200}) {
        begin("draw");
        PqCase c = random_pq(k, encoder, any_of({8, 16, 32, 64}), 4, pick(1, 6), 7);
        c.map = {.width = width, .height = 10, .images = 1};
        c.shape.taps = 1;
        c.rows = rows;
        c.first = any_of({0, c.map.rows() - rows});
        test_pq(k, c);
      }
    }
  }
}

// Offsets, splits and sums of layers as deep as real ones.
void test_deep(const Kernels& k) {
  for (Encoder encoder : {Encoder::kNearest, Encoder::kTree}) {
    for (int channels : {16, 128, 512}) {
      for (int kernel : {1, 3}) {
        begin("draw");
        const Map m{.width = 7, .height = 7, .images = 2, .kernel = kernel, .pad = kernel / 2};
        const int depth = channels * m.taps(), dim = m.taps() == 1 ? 16 : 9;
        const PqShape s{.depth = depth,
                        .taps = m.taps(),
                        .codebooks = (depth + dim - 1) / dim,
                        .centroids = encoder == Encoder::kTree ? any_of({16, 64}) : 16,
                        .dim = dim,
                        .outputs = 3,
                        .bits = 7,
                        .encoder = encoder};
        const int rows = std::min(k.row_tile, channels == 512 ? 20 : 60);
        test_pq(k, {.shape = s, .map = m, .first = m.rows() - rows - 30, .rows = rows});
      }
    }
  }
  begin("draw");
  const PqShape s{.depth = 70000,
                  .taps = 1,
                  .codebooks = 40,
                  .centroids = 16,
                  .dim = 4,
                  .outputs = 5,
                  .bits = 7,
                  .encoder = Encoder::kTree};
  test_pq(k, {.shape = s, .map = {.width = 12, .height = 1, .images = 1}, .first = 1, .rows = 11});
}

void test_lookup(const Kernels& k) {
  for (int codebooks : {1, 2, 3, 4, 5, 8, 63, 64, 65, 255, 256, 257, 511, 513, 600}) {
    for (int centroids : {8, 16, 32, 64}) {
      for (int tables = 0; tables < 5; ++tables) {
        begin("draw");
        // A linear layer: 21 entries in planes of their own.
        const PqShape s{.depth = 21,
                        .taps = 1,
                        .codebooks = codebooks,
                        .centroids = centroids,
                        .dim = 4,
                        .outputs = pick(1, codebooks * centroids > 4000 ? 9 : 70),
                        .bits = 7,
                        .encoder = Encoder::kTree};
        const Map m{.width = 100, .height = 1, .images = 1};
        const int rows = coin() ? k.row_tile : pick(1, k.row_tile);
        test_pq(k, {.shape = s,
                    .map = m,
                    .first = pick(0, 100 - rows),
                    .rows = rows,
                    .tables = static_cast<Tables>(tables)});
      }
    }
  }
  for (int outputs = 1; outputs <= 70; ++outputs) {
    for (int centroids : {16, any_of({8, 32, 64})}) {
      begin("draw");
      PqCase c = random_pq(k, any_of({Encoder::kNearest, Encoder::kTree}), centroids, 4, pick(1, 9),
                           pick(1, 7));
      c.shape.outputs = outputs;
      c.tables = static_cast<Tables>(pick(0, 4));
      test_pq(k, c);
    }
  }
}

// More outputs than kernels of one row hold in registers at once.
void test_wide(const Kernels& k) {
  for (int outputs : {96, 127, 128, 129, 192, 193, 200, 255, 256, 257, 320, 513}) {
    for (int codebooks : {1, 2, 3, 4, 5, 7, 8, 9, 13}) {
      begin("draw");
      PqCase c = random_pq(k, Encoder::kTree, any_of({8, 16, 64}), 4, 3, 7);
      c.shape.codebooks = codebooks;
      c.shape.outputs = outputs;
      c.rows = pick(1, std::min(c.rows, 18));
      c.tables = static_cast<Tables>(pick(0, 4));
      test_pq(k, c);
    }
  }
}

}  // namespace
}  // namespace lutra
