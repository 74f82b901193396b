// A product-quantised convolution or linear layer: per tile of rows, encode, look up, write.
#include <algorithm>
#include <mutex>
#include <string>
#include <vector>

#include "engine/core/limits.h"
#include "engine/layers/code_planes.h"
#include "engine/layers/layer.h"

namespace lutra {
namespace {

// Rough speed of one AVX-512 core, to guess how long a job takes: table entries added.
constexpr double kWorkPerMicrosecond = 1.5e5;
// Tiles that are encoded together and then take turns with a few outputs: their tables are read
// once for all of them, and longer stretches of the output planes, which are often a power of two
// apart, are written at a time.
constexpr int64_t kGroup = 4;
constexpr int64_t kGroupOutputs = 16;
constexpr int64_t kRowOutputs = 512;  // outputs of one work item where rows are looked up alone

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// What makes the codes: centroids, or splits and thresholds.
struct EncoderData {
  const uint8_t* centroids = nullptr;   // (codebooks, K, V)
  const int32_t* splits = nullptr;      // (codebooks, log2 K): entries of the row
  const uint8_t* thresholds = nullptr;  // (codebooks, K - 1)
};

class PqLayer : public Layer {
 public:
  // tables (shape.codebooks, K, M), scale (M), bias (M); all arrays are copied. The encoder is of
  // `codebooks` codebooks of the parts of a group. shape.taps and shape.depth are taken from the
  // geometry. With `few_rows` it can run a few rows without packed tables. Throws
  // std::invalid_argument if the sizes do not fit each other.
  PqLayer(const Kernels& kernels, PqShape shape, const ConvGeometry& geometry, Group group,
          const Quantization& quantization, const EncoderData& encoder, int64_t codebooks,
          const int8_t* tables, const float* scale, const float* bias, bool few_rows);

  void prepare(int64_t rows) const override;
  // Codes: canonical ones, (codebooks, rows).
  void check_codes(const ImageView& x, int64_t rows, const Codes& codes) const override;
  std::string method(int64_t rows) const override;
  size_t parameter_bytes() const override;

 private:
  struct Sizes;
  void check(const EncoderData& encoder) const;
  ConvGeometry source_geometry() const override { return part_geometry(geometry_, group_); }
  bool by_row(int64_t rows) const { return few_rows_ && rows <= kFewRows; }
  void pack(const int8_t* tables) const;
  Memory memory(const PatchSource& source, int threads, bool direct) const override;
  int64_t largest_sum() const override { return int64_t{128} * shape_.codebooks; }
  void run_loaded(const Call& call) const override;
  void run_patches(const Call& call, const int64_t* offsets) const;
  void run_rows(const Call& call, const Sizes& s) const;

  static constexpr int64_t kFewRows = 4;  // a tile costs as much as about seven rows

  PqShape shape_;  // of a patch
  const Group group_;
  PqShape part_;  // of what is encoded: the patch, or one of its parts
  bool few_rows_;
  AlignedBytes encoder_;
  std::unique_ptr<CodePlanes> planes_;  // of parts
  std::vector<int8_t> canonical_;       // tables, for few rows and until the others are packed
  mutable std::once_flag packing_;
  mutable AlignedBytes packed_;  // tables
};

void PqLayer::check(const EncoderData& encoder) const {
  const PqShape& s = part_;
  const Quantization& q = quantization_;
  const int32_t k = s.centroids, parts = shape_.parts;
  const int64_t depth = s.depth;
  require(is_one_of(k, kCentroidCounts), "K must be 8, 16, 32 or 64, not %", k);
  require(shape_.codebooks >= 1 && shape_.codebooks <= kMaxCodebooks,
          "codebooks must be 1..%, for exact sums, not %", kMaxCodebooks, shape_.codebooks);
  require(shape_.codebooks == int64_t{s.codebooks} * parts,
          "% codebooks for % parts of a patch need as many tables each, not % in all", s.codebooks,
          parts, shape_.codebooks);
  const size_t codebooks = static_cast<size_t>(s.codebooks);
  if (s.encoder == Encoder::kNearest) {
    require(s.dim >= 1 && s.dim <= kMaxSubvector, "V must be 1..%, not %", kMaxSubvector, s.dim);
    const int64_t needed = (depth + s.dim - 1) / s.dim;
    require(needed == s.codebooks, "it needs % codebooks, not %", needed, s.codebooks);
    for (size_t i = 0; i < codebooks * k * s.dim; ++i) {
      require(encoder.centroids[i] <= q.qmax(), "centroid value % is above %", encoder.centroids[i],
              q.qmax());
    }
    return;
  }
  size_t levels = 0;
  while ((1 << levels) < k) ++levels;
  for (size_t i = 0; i < codebooks * levels; ++i) {
    require(encoder.splits[i] >= 0 && encoder.splits[i] < depth, "split % is outside its rows of %",
            encoder.splits[i], depth);
  }
  for (size_t i = 0; i < codebooks * (k - 1); ++i) {
    require(encoder.thresholds[i] <= q.qmax() + 1, "threshold % is above %", encoder.thresholds[i],
            q.qmax() + 1);
  }
}

PqLayer::PqLayer(const Kernels& kernels, PqShape shape, const ConvGeometry& geometry, Group group,
                 const Quantization& quantization, const EncoderData& encoder, int64_t codebooks,
                 const int8_t* tables, const float* scale, const float* bias, bool few_rows)
    : Layer("product-quantised", kernels, geometry, shape.outputs, quantization, kMaxActBits, scale,
            bias),
      shape_(shape),
      group_(part_count(geometry, group) > 1 ? group : Group::kPatch),
      few_rows_(few_rows) {
  require(geometry.depth() < (int64_t{1} << 31), "its rows are too long");
  shape_.depth = static_cast<int32_t>(geometry.depth());
  shape_.taps = static_cast<int32_t>(geometry.taps());
  shape_.bits = quantization.bits;
  const ConvGeometry part = source_geometry();
  part_ = shape_;
  part_.codebooks = static_cast<int32_t>(codebooks);
  part_.depth = static_cast<int32_t>(part.depth());
  part_.taps = static_cast<int32_t>(part.taps());
  shape_.parts = shape_.taps / part_.taps;
  check(encoder);
  encoder_ = AlignedBytes(kernels.encoder_bytes(part_));
  if (part_.encoder == Encoder::kNearest) {
    kernels.pack_nearest(part_, encoder.centroids, encoder_.data());
  } else {
    kernels.pack_tree(part_, encoder.splits, encoder.thresholds, encoder_.data());
  }
  if (group_ != Group::kPatch) {
    planes_ = std::make_unique<CodePlanes>(
        kernels, part_, encoder_.data(), kernels.code_unit(shape_), geometry, group_, quantization);
  }
  const size_t entries = static_cast<size_t>(shape_.codebooks) * shape_.centroids * shape_.outputs;
  if (few_rows) {
    canonical_.assign(tables, tables + entries);
  } else {
    pack(tables);
  }
}

void PqLayer::pack(const int8_t* tables) const {
  packed_ = AlignedBytes(kernels_.table_bytes(shape_));
  kernels_.pack_tables(shape_, tables, packed_.data());
}

// A layer that has only ever seen few rows does not hold its tables twice.
void PqLayer::prepare(int64_t rows) const {
  if (few_rows_ && !by_row(rows)) {
    std::call_once(packing_, [this] { pack(canonical_.data()); });
  }
}

size_t PqLayer::parameter_bytes() const {
  return kernels_.encoder_bytes(part_) +
         static_cast<size_t>(shape_.codebooks) * shape_.centroids * shape_.outputs;
}

std::string PqLayer::method(int64_t rows) const {
  std::string name = shape_.encoder == Encoder::kTree ? "tree" : "nearest";
  if (shape_.distance == Distance::kL1) name += " by l1";
  if (shape_.distance == Distance::kChebyshev) name += " by chebyshev";
  if (group_ == Group::kRow) name += ", code once a kernel row";
  if (group_ == Group::kPixel) name += ", code once a pixel";
  return name + (by_row(rows) ? ", table rows" : ", shuffled tables");
}

// Workspace: codes of all tiles (or of each worker's tile), then what each worker needs.
struct PqLayer::Sizes {
  size_t codes, shared, tile, worker;
  int64_t tiles, group;
  bool split;  // tiles are few: their codebooks and outputs are shared out as well

  Sizes(const PqLayer& layer, const PatchSource& source, int threads, bool direct) {
    const Kernels& k = layer.kernels_;
    const PqShape& s = layer.shape_;
    const int64_t rows = source.rows();
    tiles = (rows + k.row_tile - 1) / k.row_tile;
    split = threads > 1 && tiles < 4 * threads && tiles % threads != 0;
    const int64_t share = threads == 1 ? tiles : tiles / (2 * threads);
    group = direct ? std::clamp<int64_t>(share, 1, kGroup) : 1;
    codes = align64(k.code_bytes(s));
    const size_t row_codes =
        layer.by_row(rows) ? align64(static_cast<size_t>(s.codebooks) * rows) : 0;
    const size_t sums = std::max(row_codes, align64(kRowOutputs * (2 * sizeof(float) + 1)));
    tile = TileOutput::scratch_bytes(s.outputs, k.row_tile, direct);
    const size_t own_codes = split ? 0 : static_cast<size_t>(group) * codes;
    worker = std::max(
        {align64(kMaxRowTile * sizeof(int32_t)) + own_codes + tile, source.scratch_bytes(), sums});
    // Codes of all tiles, or those of a few rows: packed, then canonical.
    shared = layer.by_row(rows) ? codes + row_codes
             : split            ? static_cast<size_t>(tiles) * codes
                                : 0;
  }
};

Layer::Memory PqLayer::memory(const PatchSource& source, int threads, bool direct) const {
  if (!planes_) {
    const Sizes s(*this, source, threads, direct);
    return {s.shared, s.worker};
  }
  const Sizes s(*this, planes_->patches(source), threads, direct);
  return {planes_->shared_bytes(source) + planes_->offset_bytes() + s.shared,
          std::max({s.worker, planes_->worker_bytes(), source.scratch_bytes()})};
}

void PqLayer::check_codes(const ImageView&, int64_t rows, const Codes& codes) const {
  require(codes.shape == std::vector<int64_t>{shape_.codebooks, rows} &&
              (rows <= 1 || codes.strides[1] == 1) &&
              (shape_.codebooks == 1 || codes.strides[0] == rows),
          "codes must have the shape (codebooks, rows) and no gaps");
}

void PqLayer::run_loaded(const Call& call) const {
  if (!planes_) return run_patches(call, nullptr);
  PatchSource patches = planes_->patches(call.source);
  const Memory m = memory(call.source, call.pool.threads(), call.direct);
  planes_->make(call.source, patches, call.shared, call.workers, m.worker, call.pool);
  uint8_t* const shared = call.shared + planes_->shared_bytes(call.source);
  const bool read = !call.codes && kernels_.reads_units && kernels_.reads_units(shape_);
  run_patches({patches, call.output, call.direct, call.codes, shared + planes_->offset_bytes(),
               call.workers, call.pool},
              read ? planes_->offsets(patches, shared) : nullptr);
}

// Codes of planes are read where they are, by their offsets, or else copied for every tile.
void PqLayer::run_patches(const Call& call, const int64_t* offsets) const {
  const PatchSource& source = call.source;
  const TileOutput& output = call.output;
  uint8_t *const all_codes = call.shared, *const workers = call.workers;
  ThreadPool& pool = call.pool;
  const Sizes s(*this, source, pool.threads(), call.direct);
  if (by_row(source.rows())) return run_rows(call, s);
  const int64_t tile = kernels_.row_tile, rows = source.rows();
  const uint8_t* const packed = packed_.data();
  struct Own {
    int32_t* row;
    uint8_t *codes, *scratch;
  };
  auto memory = [&](int worker) {
    uint8_t* at = workers + static_cast<size_t>(worker) * s.worker;
    int32_t* const row = reinterpret_cast<int32_t*>(at);
    at += align64(kMaxRowTile * sizeof(int32_t));
    return Own{row, at, at + (s.split ? 0 : static_cast<size_t>(s.group) * s.codes)};
  };
  struct Place {
    int32_t block[kMaxRowTile / kRowBlock];
    const uint8_t* planes;  // null: the codes are copied
  };
  auto find = [&](int64_t index) {
    Place p;
    const int64_t row = index * tile;
    p.planes = offsets ? source.blocks(row, std::min(tile, rows - row), p.block) : nullptr;
    return p;
  };
  auto encode = [&](int64_t index, int32_t first, int32_t last, const Own& m, uint8_t* codes) {
    const int64_t row = index * tile, count = std::min(tile, rows - row);
    const Patch patch = source.tile(row, count, static_cast<int32_t>(tile), m.row);
    if (planes_) {
      kernels_.gather_codes(shape_, patch, first, last, codes);
    } else {
      kernels_.encode(shape_, encoder_.data(), patch, first, last, codes);
    }
  };
  auto keep = [&](int64_t index, const uint8_t* codes) {
    const int64_t row = index * tile, count = std::min(tile, rows - row);
    kernels_.unpack_codes(shape_, codes, static_cast<int32_t>(count), call.codes + row,
                          static_cast<size_t>(rows));
  };
  auto add = [&](const Place& p, const uint8_t* codes, int64_t first, int64_t last,
                 const Epilogue& e) {
    const int32_t from = static_cast<int32_t>(first), to = static_cast<int32_t>(last);
    if (!p.planes) return kernels_.lookup(shape_, packed, codes, from, to, e);
    kernels_.lookup_units(shape_, packed, {p.planes, offsets, p.block}, from, to, e);
  };
  auto lookup = [&](int64_t index, int32_t first, int32_t last, const Own& m, const Place& place,
                    const uint8_t* codes) {
    const int64_t row = index * tile, count = std::min(tile, rows - row);
    output.make(
        row, count, m.scratch, 0, first, last,
        [&](int64_t from, int64_t to, const Epilogue& e) { add(place, codes, from, to, e); });
  };
  // Codes of planes are only copied.
  const double encoding = planes_
                              ? static_cast<double>(rows) * shape_.codebooks / kWorkPerMicrosecond
                              : encoding_time(shape_, rows);
  const double looking =
      static_cast<double>(rows) * shape_.codebooks * shape_.outputs / kWorkPerMicrosecond;
  if (!s.split) {
    const int64_t groups = (s.tiles + s.group - 1) / s.group;
    pool.run(static_cast<size_t>(groups), encoding + looking, [&](size_t i, int worker) {
      const Own m = memory(worker);
      const int64_t begin = static_cast<int64_t>(i) * s.group;
      const int64_t end = std::min(s.tiles, begin + s.group);
      Place places[kGroup];
      for (int64_t t = begin; t < end; ++t) {
        uint8_t* const codes = m.codes + static_cast<size_t>(t - begin) * s.codes;
        places[t - begin] = find(t);
        if (!places[t - begin].planes) encode(t, 0, shape_.codebooks, m, codes);
        if (call.codes) keep(t, codes);
      }
      if (s.group == 1) return lookup(begin, 0, shape_.outputs, m, places[0], m.codes);
      Epilogue e[kGroup];
      for (int64_t t = begin; t < end; ++t) {
        e[t - begin] = output.begin(t * tile, std::min(tile, rows - t * tile), m.scratch);
      }
      for (int32_t first = 0; first < shape_.outputs; first += kGroupOutputs) {
        const int32_t last = std::min<int32_t>(shape_.outputs, first + kGroupOutputs);
        for (int64_t t = begin; t < end; ++t) {
          const uint8_t* const codes = m.codes + static_cast<size_t>(t - begin) * s.codes;
          if (output.plain()) {
            add(places[t - begin], codes, first, last, e[t - begin]);
          } else {
            lookup(t, first, last, m, places[t - begin], codes);
          }
        }
      }
    });
    return;
  }
  const int64_t parts = 2 * pool.threads();
  const int64_t codebook_step =
      round_up((shape_.codebooks + parts - 1) / parts, kernels_.codebook_tile);
  const int64_t codebook_parts = (shape_.codebooks + codebook_step - 1) / codebook_step;
  pool.run(static_cast<size_t>(s.tiles * codebook_parts), encoding, [&](size_t i, int worker) {
    const int64_t index = static_cast<int64_t>(i) / codebook_parts;
    const int64_t first = static_cast<int64_t>(i) % codebook_parts * codebook_step;
    if (find(index).planes) return;
    encode(index, static_cast<int32_t>(first),
           static_cast<int32_t>(std::min<int64_t>(shape_.codebooks, first + codebook_step)),
           memory(worker), all_codes + static_cast<size_t>(index) * s.codes);
  });
  if (call.codes) {
    for (int64_t i = 0; i < s.tiles; ++i) keep(i, all_codes + static_cast<size_t>(i) * s.codes);
  }
  // Whole groups of 16 outputs where possible: kernels take that many at a time for few rows.
  const int64_t output_step =
      round_up((shape_.outputs + parts - 1) / parts, std::max<int64_t>(16, kernels_.output_tile));
  const int64_t output_parts = (shape_.outputs + output_step - 1) / output_step;
  pool.run(static_cast<size_t>(s.tiles * output_parts), looking, [&](size_t i, int worker) {
    const int64_t index = static_cast<int64_t>(i) / output_parts;
    const int64_t first = static_cast<int64_t>(i) % output_parts * output_step;
    lookup(index, static_cast<int32_t>(first),
           static_cast<int32_t>(std::min<int64_t>(shape_.outputs, first + output_step)),
           memory(worker), find(index), all_codes + static_cast<size_t>(index) * s.codes);
  });
}

void PqLayer::run_rows(const Call& call, const Sizes& s) const {
  const int64_t rows = call.source.rows(), codebooks = shape_.codebooks;
  uint8_t *const codes = call.shared, *const workers = call.workers;
  int32_t row[kMaxRowTile];
  const Patch patch = call.source.tile(0, rows, kernels_.row_tile, row);
  kernels_.encode(shape_, encoder_.data(), patch, 0, shape_.codebooks, codes);
  uint8_t* const canonical = codes + s.codes;  // (rows, codebooks)
  kernels_.unpack_codes(shape_, codes, static_cast<int32_t>(rows), workers,
                        static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t b = 0; b < codebooks; ++b) canonical[r * codebooks + b] = workers[b * rows + r];
  }
  if (call.codes) std::copy(workers, workers + codebooks * rows, call.codes);
  const int64_t parts = (shape_.outputs + kRowOutputs - 1) / kRowOutputs;
  const double work = static_cast<double>(rows * codebooks) * shape_.outputs / kWorkPerMicrosecond;
  call.pool.run(static_cast<size_t>(rows * parts), work, [&](size_t i, int worker) {
    const int64_t r = static_cast<int64_t>(i) / parts;
    const int64_t first = static_cast<int64_t>(i) % parts * kRowOutputs;
    const int64_t count = std::min<int64_t>(kRowOutputs, shape_.outputs - first);
    uint8_t* const memory = workers + static_cast<size_t>(worker) * s.worker;
    int32_t* const sums = reinterpret_cast<int32_t*>(memory);
    kernels_.lookup_row(shape_, canonical_.data(), canonical + r * codebooks,
                        static_cast<int32_t>(first), static_cast<int32_t>(first + count), sums);
    call.output.row(r, sums, first, count, memory + kRowOutputs * sizeof(int32_t));
  });
}

std::unique_ptr<Layer> make_pq(const Kernels& kernels, const StepArgs& args, bool linear) {
  const ConvGeometry geometry = row_geometry(args, linear);
  const Tensor<int8_t> tables = args.tensor<int8_t>("tables", 3);
  const bool nearest = args.has("centroids");
  const std::string name = args.attrs.count("group") ? args.text("group") : "patch";
  require(name == "patch" || name == "row" || name == "pixel",
          "group must be patch, row or pixel, not %", name);
  const Group group = name == "row" ? Group::kRow : name == "pixel" ? Group::kPixel : Group::kPatch;
  const std::string by = args.attrs.count("distance") ? args.text("distance") : "l2";
  require(by == "l2" || by == "l1" || by == "chebyshev",
          "distance must be l2, l1 or chebyshev, not %", by);
  require(by == "l2" || nearest, "a tree measures no distance; give it l2, not %", by);
  require(args.has("splits") != nearest && args.has("thresholds") != nearest,
          "a layer has centroids, or splits and thresholds; give one of the two");
  PqShape s{.codebooks = static_cast<int32_t>(tables[0]),
            .centroids = static_cast<int32_t>(tables[1]),
            .outputs = static_cast<int32_t>(tables[2])};
  if (by == "l1") s.distance = Distance::kL1;
  if (by == "chebyshev") s.distance = Distance::kChebyshev;
  EncoderData e;
  int64_t codebooks = 0;
  if (nearest) {
    const Tensor<uint8_t> centroids = args.tensor<uint8_t>("centroids", 3);
    require(tables[1] == centroids[1], "centroids and tables differ in K");
    codebooks = centroids[0];
    s.encoder = Encoder::kNearest;
    s.dim = static_cast<int32_t>(centroids[2]);
    e.centroids = centroids.data;
  } else {
    const Tensor<int32_t> splits = args.tensor<int32_t>("splits", 2);
    const Tensor<uint8_t> thresholds = args.tensor<uint8_t>("thresholds", 2);
    codebooks = splits[0];
    require(codebooks == thresholds[0] && tables[1] == thresholds[1] + 1 &&
                tables[1] == int64_t{1} << std::min<int64_t>(splits[1], 31),
            "splits, thresholds and tables differ in codebooks or K");
    s.encoder = Encoder::kTree;
    e.splits = splits.data;
    e.thresholds = thresholds.data;
  }
  return std::make_unique<PqLayer>(kernels, s, geometry, group, grid_of(args), e, codebooks,
                                   tables.data, per_output(args, "scale", tables[2]),
                                   per_output(args, "bias", tables[2]), linear);
}

}  // namespace

void pq_ops(OpRegistry& r) {
  r.add("pq_conv2d", layer_operator<make_pq, false>());
  r.add("pq_linear", layer_operator<make_pq, true>());
}

}  // namespace lutra
