// The quantised input of a layer, tile by tile.
//
// The planes are padded copies in a workspace, or the value itself where nothing has to be padded.
#pragma once

#include "engine/core/quantization.h"
#include "engine/core/thread_pool.h"
#include "engine/layers/patches.h"

namespace lutra {

class PatchSource {
 public:
  // An element of a plane has `unit` bytes: 1 or 4.
  PatchSource(const ConvGeometry& g, int64_t n, int64_t h, int64_t w, int64_t unit = 1);

  // Memory that load() takes, and scratch for every worker.
  size_t bytes() const;
  size_t scratch_bytes() const;

  // From a quantised value with consecutive pixels or channels, or from floats in any layout. The
  // sizes must be those given to the constructor; scratch of the workers lies `stride` bytes apart.
  void load(const ByteView& x, int32_t zero, uint8_t* workspace, uint8_t* scratch, size_t stride,
            ThreadPool& pool);
  // From planes of elements of one byte or four that have a padding each, one element.
  template <class T>
  void load(const View<const T>& x, const uint8_t* padding, uint8_t* workspace, ThreadPool& pool);
  // From planes of bytes of `channels` channels, `plane` bytes apart: elements are quads, four of
  // these channels each. Those that are missing in the last plane repeat another. Scratch of the
  // workers is quad_scratch_bytes().
  void load_quads(const uint8_t* x, int64_t plane, int64_t channels, uint8_t zero,
                  uint8_t* workspace, uint8_t* scratch, size_t stride, ThreadPool& pool);
  size_t quad_scratch_bytes() const;
  // Planes for the caller to write: pads them, as above, and says where pixels begin. Only where
  // the lines of an image follow each other without a gap.
  bool gapless() const { return planes_.gapless(); }
  struct Pixels {
    uint8_t* first;
    int64_t plane, image;  // bytes from one to the next
  };
  Pixels open(const uint8_t* padding, uint8_t* workspace);
  void load(const ImageView& x, const Kernels& kernels, const Grid& grid, uint8_t* workspace,
            uint8_t* scratch, size_t stride, ThreadPool& pool);

  const ConvGeometry& geometry() const { return g_; }
  int64_t images() const { return n_; }
  int64_t height() const { return h_; }
  int64_t width() const { return w_; }
  int64_t rows() const { return planes_.rows(); }
  const PaddedPlanes<uint8_t>& planes() const { return planes_; }
  const uint8_t* data() const { return data_; }
  int64_t plane() const { return plane_; }  // bytes between channels

  // Rows first..first+count-1. `row` has row_tile entries and must live as long as the patch.
  Patch tile(int64_t first, int64_t count, int32_t row_tile, int32_t* row) const;
  // The same rows in blocks of kRowBlock, if those of each are consecutive: gives where they begin,
  // from the address that is returned. Else null.
  const uint8_t* blocks(int64_t first, int64_t count, int32_t* block) const;
  // Of the first `count` entries of a row.
  void entry_offsets(int64_t count, int64_t* offset) const;

 private:
  uint8_t* begin(uint8_t* workspace);
  // Reads the value where it is, if that is what tile() needs.
  bool take(const ByteView& x);
  template <class T, class PaddingOf>
  void copy_planes(const View<const T>& x, T* to, ThreadPool& pool, const PaddingOf& padding_of);
  void subsample(const ByteView& x, uint8_t* to, ThreadPool& pool);

  ConvGeometry g_;
  int64_t n_, h_, w_, unit_;
  PaddedPlanes<uint8_t> planes_;
  const uint8_t* data_ = nullptr;
  int64_t plane_ = 0;
  bool consecutive_ = false;  // all rows are
  int32_t* taps_ = nullptr;
};

}  // namespace lutra
