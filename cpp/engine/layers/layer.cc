#include "engine/layers/layer.h"

namespace lutra {

Layer::Layer(std::string name, const Kernels& kernels, const ConvGeometry& geometry,
             int64_t outputs, const Quantization& quantization, int most_bits, const float* scale,
             const float* bias)
    : name_(std::move(name)),
      kernels_(kernels),
      geometry_(geometry),
      outputs_(outputs),
      quantization_(quantization),
      scale_(scale, scale + outputs),
      bias_(bias, bias + outputs) {
  const Quantization& q = quantization;
  require(outputs >= 1, "it has no outputs");
  require(q.bits >= 1 && q.bits <= most_bits, "activation bits must be 1..%, not %", most_bits,
          q.bits);
  require(q.zero >= 0 && q.zero <= q.qmax() && q.scale > 0,
          "the zero point must be on the grid and its scale positive");
  grid_ = make_grid(q);
}

void Layer::fail(const char* pattern, std::initializer_list<Word> words) const {
  lutra::fail("% layer: %", {name_, sentence(pattern, words)});
}

size_t Layer::workspace_bytes(int64_t n, int64_t h, int64_t w, int threads, bool direct) const {
  const PatchSource source(source_geometry(), n, h, w);
  const Memory m = memory(source, threads, direct);
  return align64(source.bytes()) + m.shared + static_cast<size_t>(threads) * m.worker;
}

template <class X, class Load>
void Layer::run_from(const X& x, const LayerOutput& output, uint8_t* codes, uint8_t* workspace,
                     ThreadPool& pool, const Load& load) const {
  PatchSource source(source_geometry(), x.n, x.h, x.w);
  const bool direct = TileOutput::direct(output.view);
  const Memory m = memory(source, pool.threads(), direct);
  uint8_t* const shared = workspace + align64(source.bytes());
  uint8_t* const workers = shared + m.shared;
  load(source, workers, m.worker);
  const int32_t* const offset = offset_.empty() ? nullptr : offset_.data();
  const TileOutput target(output, kernels_, offset, scale_.data(), bias_.data());
  run_loaded({source, target, direct, codes, shared, workers, pool});
}

void Layer::run(const ByteView& x, const LayerOutput& output, uint8_t* workspace,
                ThreadPool& pool) const {
  run_from(x, output, nullptr, workspace, pool,
           [&](PatchSource& source, uint8_t* workers, size_t stride) {
             source.load(x, quantization_.zero, workspace, workers, stride, pool);
           });
}

void Layer::run(const ImageView& x, const LayerOutput& output, uint8_t* codes, uint8_t* workspace,
                ThreadPool& pool) const {
  run_from(x, output, codes, workspace, pool,
           [&](PatchSource& source, uint8_t* workers, size_t stride) {
             source.load(x, kernels_, grid_, workspace, workers, stride, pool);
           });
}

}  // namespace lutra
