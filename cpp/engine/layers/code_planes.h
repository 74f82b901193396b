// Codes that belong to pixels: made once, read by every patch that the pixel is in.
//
// A part of a patch (a row of the kernel, or a pixel) is a patch of its own, of another geometry:
// its codes are planes of units: bytes, one plane for each codebook, or what else the instruction
// set takes. The kernel then walks over these planes as it does over those of the input.
#pragma once

#include <vector>

#include "engine/core/memory.h"
#include "engine/layers/patch_source.h"

namespace lutra {

enum class Group { kPatch, kRow, kPixel };

// How many parts a patch has. A patch of one part is encoded as a whole.
int64_t part_count(const ConvGeometry& g, Group group);
// The parts of a patch, as patches of the input.
ConvGeometry part_geometry(const ConvGeometry& g, Group group);
// How long it takes to make the codes of so many rows, in microseconds, to guess.
double encoding_time(const PqShape& shape, int64_t rows);

class CodePlanes {
 public:
  // `shape` is of the codebooks that encode a part, packed in `encoder`; `unit` is that of the
  // planes. All must outlive this.
  CodePlanes(const Kernels& kernels, const PqShape& shape, const uint8_t* encoder, int32_t unit,
             const ConvGeometry& geometry, Group group, const Quantization& quantization);

  // How many units a patch has, and where they are in the planes of `patches`.
  int64_t patch_units() const { return codes_.channels * codes_.taps(); }
  const int64_t* offsets(const PatchSource& patches, uint8_t* memory) const;
  size_t offset_bytes() const {
    return align64(static_cast<size_t>(patch_units() + 1) * sizeof(int64_t));
  }

  // Patches of codes, for a source of parts.
  PatchSource patches(const PatchSource& parts) const;
  // Memory for all workers and for each, beside that of what is done with the patches.
  size_t shared_bytes(const PatchSource& parts) const;
  size_t worker_bytes() const;

  // Makes the codes of all parts and loads the patches with them.
  void make(const PatchSource& parts, PatchSource& patches, uint8_t* shared, uint8_t* workers,
            size_t stride, ThreadPool& pool) const;

 private:
  size_t code_bytes(const PatchSource& parts) const;  // of the planes
  void unpack(const uint8_t* codes, int32_t rows, uint8_t* out, size_t stride) const;

  const Kernels& kernels_;
  const PqShape& shape_;
  const uint8_t* const encoder_;
  const int32_t unit_;
  const ConvGeometry codes_;
  std::vector<uint8_t> padding_;  // the codes of zeros
};

}  // namespace lutra
