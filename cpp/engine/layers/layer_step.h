// The steps of convolutions and linear layers, each with its fused epilogue.
#pragma once

#include <memory>
#include <vector>

#include "engine/layers/conv_geometry.h"
#include "engine/layers/tile_output.h"

namespace lutra {

// The view of a stored value (N, C, H, W).
template <class T>
View<T> stored_image(const Shape& s, T* data) {
  return {.data = data,
          .n = s[0],
          .c = s[1],
          .h = s[2],
          .w = s[3],
          .sn = s.inner(),
          .sc = s[0] * s.inner(),
          .sh = s[3],
          .sw = 1};
}

// The view of a stored value (N, ..., D) as rows of D: images of one pixel. Channel-first order
// makes planes of (N, D) and (N, T, D), and leaves the last of more axes where it is.
template <class T>
View<T> stored_rows(const Shape& s, T* data) {
  const Dims strides = storage_strides(s);
  const int64_t features = s[s.rank - 1];
  return {.data = data,
          .n = s.size() / features,
          .c = features,
          .h = 1,
          .w = 1,
          .sn = plane_axis(s.rank) == s.rank - 1 ? 1 : features,
          .sc = strides[s.rank - 1],
          .sh = 1,
          .sw = 1};
}

// What all layers have: the layer works on images (N, C, H, W) or on rows (N, ..., D), and may add
// a second input before the clamp.
class LayerStep : public Step {
 public:
  LayerStep(const ConvGeometry& geometry, int64_t outputs, bool linear, const StepArgs& args)
      : geometry_(geometry),
        outputs_(outputs),
        linear_(linear),
        residual_(args.residual >= 0),
        channels_are_outputs_(!linear || args.output_shape.size() == 2),
        clamp_(args.clamp) {}
  Shape infer(const Shapes& inputs) const override;
  int max_quantized() const override { return kMaxQuantized; }
  bool absorb(const Step& next) override;

 protected:
  template <class T>
  View<T> view(const Shape& shape, T* data) const {
    return linear_ ? stored_rows(shape, data) : stored_image(shape, data);
  }
  // What run() will find: it depends on the outputs too, for rows of one value are consecutive.
  bool direct(const Shapes& inputs) const {
    return TileOutput::direct(view<float>(infer(inputs), nullptr));
  }
  LayerOutput output(const StepRun& r) const;
  int64_t rows(const Shape& x) const;

  ConvGeometry geometry_;  // of the whole layer
  int64_t outputs_;
  bool linear_, residual_;
  bool channels_are_outputs_;  // axis 1 of what it makes
  Clamp clamp_;
  ElementwisePtr function_;  // of what the rest makes; null: none
  Fold fold_;
};

// The value that a layer reads, and the one that it adds if it adds any.
inline std::vector<int> with_residual(int x, const StepArgs& args) {
  return args.residual < 0 ? std::vector<int>{x} : std::vector<int>{x, args.residual};
}

}  // namespace lutra
