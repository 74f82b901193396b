// Planes of a depthwise layer, as its kernels read them, and the tiles of its outputs.
//
// The outputs of an image are one line where that is possible: a stored line of the plane has as
// many elements as the outputs of a line step over, and the tap of an output is always at the same
// distance. Where that is in the line before, after, or outside of the image, a mask of the tile
// says that the tap is padding, so nothing is padded and small images fill the lanes. With a
// stride, every second (third, ...) line makes a plane of its own; so do columns, but the bytes at
// a stride of 2, which the kernel takes apart.
//
// Where lines are longer than that (little padding), a tile has outputs of one line only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "engine/core/memory.h"
#include "engine/layers/conv_geometry.h"
#include "kernels/kernels.h"

namespace lutra {

// Whether the kernels of depthwise layers take it.
inline bool is_depthwise(const ConvGeometry& g, int64_t groups) {
  return groups > 1 && groups == g.channels && g.taps() <= kMaxDepthwiseTaps;
}

// The part that does not depend on the size of images.
DepthwiseShape depthwise_shape(const ConvGeometry& g, int64_t outputs, bool bytes);

struct DepthwisePlanes {
  // bytes: of int8 layers; else floats
  DepthwisePlanes(const Kernels& kernels, const ConvGeometry& g, const DepthwiseShape& shape,
                  int64_t height, int64_t width, bool bytes);

  // What tiles read of `count` planes that are stored line after line, `step` elements apart from x
  // on, in an array of begin..end-1. They are read where they are if the tiles stay in the array:
  // masks hide what lies around an image. Else they are copied.
  template <class T>
  struct Source {
    const T* first;  // plus the `at` of a tile
    int64_t plane;   // elements from one to the next
  };
  template <class T>
  Source<T> source(const T* x, int64_t step, int64_t count, const T* begin, const T* end,
                   T* copies) const {
    if (whole_ && x - begin >= least_ && end - (x + (count - 1) * step) >= most_) {
      return {x - before_, step};
    }
    for (int64_t k = 0; k < count; ++k) copy(x + k * step, copies + k * plane);
    return {copies, plane};
  }
  const uint8_t* masks(size_t set) const { return masks_.data() + set * mask_bytes_; }

  struct Tile {
    int64_t first;  // row of the image's outputs
    int64_t count;
    int64_t at;  // element of a plane
    size_t masks;
  };
  int64_t height, width;
  int64_t outputs;              // rows of an image
  int64_t plane;                // elements
  std::vector<int32_t> offset;  // (taps)
  std::vector<Tile> tiles;

 private:
  void find_tiles(const Kernels& kernels, const DepthwiseShape& shape, bool bytes);
  template <class T>
  void copy(const T* x, T* plane) const;

  ConvGeometry g_;
  int64_t columns_;  // planes that the columns are spread over
  int64_t pitch_, part_, before_;
  int64_t least_, most_;        // elements before and from the first pixel on that tiles read
  std::vector<int64_t> lines_;  // of each plane that the lines are spread over
  bool whole_;                  // the plane as it is
  size_t mask_bytes_;
  AlignedBytes masks_;
};

// Those of the last few sizes of images.
class DepthwiseCache {
 public:
  DepthwiseCache(const Kernels& kernels, const ConvGeometry& g, int64_t outputs, bool bytes)
      : shape(depthwise_shape(g, outputs, bytes)), kernels_(kernels), g_(g), bytes_(bytes) {}
  std::shared_ptr<const DepthwisePlanes> find(int64_t height, int64_t width) const;

  const DepthwiseShape shape;

 private:
  static constexpr size_t kKept = 8;

  const Kernels& kernels_;
  const ConvGeometry g_;
  bool bytes_;
  mutable std::mutex mutex_;
  mutable std::vector<std::shared_ptr<const DepthwisePlanes>> kept_;  // the last one used last
};

// Channels that are worked on together: what a tile costs beside its sums is shared among them.
// Their planes stay in the second cache, small ones in the nearest, and every thread has two blocks
// where it can.
inline int64_t depthwise_block(int64_t channels, int64_t plane_bytes, int threads) {
  constexpr int64_t kCache = 256 << 10, kNear = 16 << 10, kMost = 16;
  const int64_t share = (channels + 2 * threads - 1) / (2 * threads);
  const int64_t most = std::max(kMost, kNear / plane_bytes);
  return std::max<int64_t>(1, std::min({most, kCache / plane_bytes, share}));
}

}  // namespace lutra
