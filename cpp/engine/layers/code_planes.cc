#include "engine/layers/code_planes.h"

#include <algorithm>

#include "kernels/built.h"

namespace lutra {
namespace {

constexpr double kComparedPerMicrosecond = 1.5e5;  // centroid values, of one AVX-512 core

// The patch, as a patch of planes of codes.
ConvGeometry code_geometry(const ConvGeometry& g, Group group, int64_t planes) {
  ConvGeometry codes = g;
  codes.channels = planes;
  if (group == Group::kRow) {
    codes.kernel_w = codes.stride_w = codes.dilation_w = 1;
    codes.pad_w = codes.end_w = 0;
  }
  return codes;
}

}  // namespace

double encoding_time(const PqShape& shape, int64_t rows) {
  const double compare =
      shape.encoder == Encoder::kTree ? 8.0 : static_cast<double>(shape.centroids) * shape.dim;
  return static_cast<double>(rows) * shape.codebooks * compare / kComparedPerMicrosecond;
}

int64_t part_count(const ConvGeometry& g, Group group) {
  return group == Group::kPatch ? 1 : group == Group::kRow ? g.kernel_h : g.taps();
}

ConvGeometry part_geometry(const ConvGeometry& g, Group group) {
  if (group == Group::kPatch) return g;
  if (group == Group::kPixel) return {.channels = g.channels};
  return {.channels = g.channels,
          .kernel_w = g.kernel_w,
          .stride_w = g.stride_w,
          .pad_w = g.pad_w,
          .end_w = g.end_w,
          .dilation_w = g.dilation_w};
}

CodePlanes::CodePlanes(const Kernels& kernels, const PqShape& shape, const uint8_t* encoder,
                       int32_t unit, const ConvGeometry& geometry, Group group,
                       const Quantization& quantization)
    : kernels_(kernels),
      shape_(shape),
      encoder_(encoder),
      unit_(unit),
      codes_(code_geometry(geometry, group, shape.codebooks / unit)),
      padding_(static_cast<size_t>(shape.codebooks)) {
  // A patch in which every entry of every row is the same byte.
  const std::vector<uint8_t> zeros(2 * kSlack, static_cast<uint8_t>(quantization.zero));
  const std::vector<int32_t> taps(static_cast<size_t>(shape.taps)), rows(kMaxRowTile);
  AlignedBytes codes(kernels.code_bytes(shape));
  const Patch patch{zeros.data(), 0, taps.data(), rows.data(), 1, true};
  kernels.encode(shape, encoder, patch, 0, shape.codebooks, codes.data());
  unpack(codes.data(), 1, padding_.data(), static_cast<size_t>(unit));
}

void CodePlanes::unpack(const uint8_t* codes, int32_t rows, uint8_t* out, size_t stride) const {
  (unit_ == 1 ? kernels_.unpack_codes : kernels_.unpack_units)(shape_, codes, rows, out, stride);
}

PatchSource CodePlanes::patches(const PatchSource& parts) const {
  const ConvGeometry& g = parts.geometry();
  return PatchSource(codes_, parts.images(), g.out_h(parts.height()), g.out_w(parts.width()),
                     unit_);
}

const int64_t* CodePlanes::offsets(const PatchSource& patches, uint8_t* memory) const {
  int64_t* const to = reinterpret_cast<int64_t*>(memory);
  patches.entry_offsets(patch_units(), to);
  to[patch_units()] = to[0];
  return to;
}

size_t CodePlanes::code_bytes(const PatchSource& parts) const {
  return align64(static_cast<size_t>(shape_.codebooks * parts.rows()) + kSlack);
}

size_t CodePlanes::shared_bytes(const PatchSource& parts) const {
  return code_bytes(parts) + align64(patches(parts).bytes());
}

size_t CodePlanes::worker_bytes() const {
  return align64(kMaxRowTile * sizeof(int32_t)) + align64(kernels_.code_bytes(shape_));
}

void CodePlanes::make(const PatchSource& parts, PatchSource& patches, uint8_t* shared,
                      uint8_t* workers, size_t stride, ThreadPool& pool) const {
  const int64_t rows = parts.rows(), tile = kernels_.row_tile, tiles = (rows + tile - 1) / tile;
  const ConvGeometry& g = parts.geometry();
  const int64_t height = g.out_h(parts.height()), width = g.out_w(parts.width());
  const int64_t pixels = height * width;
  uint8_t* const workspace = shared + code_bytes(parts);
  // Straight to their places, where tiles do not cross images.
  const bool in_place = patches.gapless() && (parts.images() == 1 || pixels % tile == 0);
  const PatchSource::Pixels places = in_place ? patches.open(padding_.data(), workspace)
                                              : PatchSource::Pixels{shared, rows * unit_, 0};
  pool.run(static_cast<size_t>(tiles), encoding_time(shape_, rows), [&](size_t i, int worker) {
    uint8_t* const memory = workers + static_cast<size_t>(worker) * stride;
    uint8_t* const codes = memory + align64(kMaxRowTile * sizeof(int32_t));
    const int64_t first = static_cast<int64_t>(i) * tile, count = std::min(tile, rows - first);
    const Patch patch =
        parts.tile(first, count, static_cast<int32_t>(tile), reinterpret_cast<int32_t*>(memory));
    kernels_.encode(shape_, encoder_, patch, 0, shape_.codebooks, codes);
    const int64_t image = in_place ? first / pixels : 0;
    unpack(codes, static_cast<int32_t>(count),
           places.first + image * places.image + (first - image * pixels) * unit_,
           static_cast<size_t>(places.plane));
  });
  if (in_place) return;
  const auto load = [&]<class T>(const T* codes) {
    const View<const T> view{codes,  parts.images(), codes_.channels, height,    width,
                             pixels, rows,           width,           int64_t{1}};
    patches.load(view, padding_.data(), workspace, pool);
  };
  if (!kHaveUnits || unit_ == 1) return load(static_cast<const uint8_t*>(shared));
  load(reinterpret_cast<const uint32_t*>(shared));
}

}  // namespace lutra
