#include "c/compiled_model.h"

#include <algorithm>
#include <bit>
#include <set>

#include "c/byte_reader.h"

namespace lutra {
namespace {

static_assert(std::endian::native == std::endian::little, "arrays are read as they lie in files");

constexpr uint8_t kMagic[8] = {0x89, 'l', 'u', 't', 'r', 'a', 'c', '\n'};
constexpr uint32_t kVersion = 1;
constexpr size_t kHead = 24;  // magic, version, checksum, length
constexpr size_t kAlign = 64;
// A shape that no memory holds is refused before its size is computed.
constexpr int64_t kMaxElements = int64_t{1} << 40;

// The content behind the head, once its checksum is right.
struct Parts {
  ByteReader description;
  const uint8_t* data;
  size_t size;
};

Parts open_parts(const uint8_t* data, size_t size) {
  require(size >= kHead && std::equal(kMagic, kMagic + sizeof kMagic, data),
          "it is no compiled model; make one with: lutra compile model.lutra -o model.lutrac");
  ByteReader head(data + sizeof kMagic, kHead - sizeof kMagic);
  const uint32_t version = head.u32(), checksum = head.u32();
  require(version == kVersion,
          "it has version % of the format, and this library reads version %; compile the .lutra "
          "file with the lutra of this library",
          version, kVersion);
  require(crc32(data + 16, size - 16) == checksum, "its checksum does not match its content");
  const uint64_t length = head.u64();
  require(length <= size - kHead, "its description is longer than it is");
  const size_t end = kHead + static_cast<size_t>(length);
  const size_t start = std::min(size, (end + kAlign - 1) / kAlign * kAlign);
  return {{data + kHead, static_cast<size_t>(length)}, data + start, size - start};
}

size_t item_size(Dtype dtype) { return dtype == Dtype::kInt32 || dtype == Dtype::kFloat32 ? 4 : 1; }

Dtype read_dtype(ByteReader& in) {
  const uint8_t dtype = in.byte();
  require(dtype < static_cast<uint8_t>(Dtype::kOther), "there is no dtype %", dtype);
  return static_cast<Dtype>(dtype);
}

std::vector<TensorView> read_arrays(Parts& parts) {
  ByteReader& in = parts.description;
  std::vector<TensorView> arrays(in.count(13));
  for (TensorView& array : arrays) {
    array.dtype = read_dtype(in);
    array.shape = in.sizes();
    const uint64_t place = in.u64();
    require(!array.shape.empty() && array.shape.size() <= kMaxRank, "an array has % axes",
            array.shape.size());
    require(place <= parts.size && place % kAlign == 0, "an array lies outside the data");
    size_t room = (parts.size - static_cast<size_t>(place)) / item_size(array.dtype);
    for (const int64_t size : array.shape) {
      require(size >= 1 && static_cast<uint64_t>(size) <= room, "an array is larger than the data");
      room /= static_cast<size_t>(size);
    }
    array.data = parts.data + place;
  }
  return arrays;
}

// Of a value: -1 is a size that is known at run time only.
Sizes read_shape(ByteReader& in) {
  Sizes shape = in.sizes();
  require(!shape.empty() && shape.size() <= kMaxRank, "a value has % axes", shape.size());
  int64_t room = kMaxElements;
  for (const int64_t size : shape) {
    require(size >= 1 || size == -1, "a value has an axis of %", size);
    room /= std::max<int64_t>(size, 1);
  }
  require(room > 0, "a value is too large for memory");
  return shape;
}

Attr read_attr(ByteReader& in) {
  const uint8_t kind = in.byte();
  switch (kind) {
    case kind_of<bool>():
      return in.byte() != 0;
    case kind_of<int64_t>():
      return in.integer();
    case kind_of<double>():
      return in.f64();
    case kind_of<std::string>():
      return in.text();
    case kind_of<Sizes>():
      return in.sizes();
    default:
      throw std::invalid_argument("there is no kind " + std::to_string(kind) + " of attributes");
  }
}

// The values of the plan by their numbers in the file.
class Values {
 public:
  void add(int value) { plan_.push_back(value); }
  int operator[](uint32_t number) const {
    require(number < plan_.size(), "value % is read before it is made", number);
    return plan_[number];
  }

 private:
  std::vector<int> plan_;
};

void read_step(ByteReader& in, const std::vector<TensorView>& arrays, Plan& plan, Values& values) {
  StepArgs args;
  args.op = in.text();
  std::string label = in.text();
  for (uint32_t n = in.count(12); n > 0; --n) {
    args.inputs.push_back(values[in.u32()]);
    const uint32_t plane = in.u32();
    require(plane <= INT32_MAX, "there is no plane %", plane);
    args.planes.push_back(static_cast<int>(plane));
    args.input_shapes.push_back(read_shape(in));
  }
  args.output_shape = read_shape(in);
  if (const uint32_t residual = in.u32()) args.residual = values[residual - 1];
  if (in.byte() != 0) {
    args.clamp.on = true;
    args.clamp.low = in.f32();
    args.clamp.high = in.f32();
  }
  for (uint32_t n = in.count(6); n > 0; --n) {
    std::string name = in.text();
    args.attrs[std::move(name)] = read_attr(in);
  }
  for (uint32_t n = in.count(8); n > 0; --n) {
    std::string role = in.text();
    const uint32_t array = in.u32();
    require(array < arrays.size(), "there is no array %", array);
    args.tensors[std::move(role)] = arrays[array];
  }
  try {
    plan.set_label(label);
    values.add(op_registry().build(plan, args));
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument("step '" + label + "' (" + args.op + "): " + error.what());
  }
}

}  // namespace

CompiledModel::CompiledModel(const uint8_t* data, size_t size, const Kernels& kernels, int threads)
    : plan(kernels, threads) {
  Parts parts = open_parts(data, size);
  ByteReader& in = parts.description;
  metadata = in.text();
  const std::vector<TensorView> arrays = read_arrays(parts);
  Values values;
  for (uint32_t n = in.count(9); n > 0; --n) {
    std::string name = in.text();
    const Dtype dtype = read_dtype(in);
    require(dtype == Dtype::kInt32 || dtype == Dtype::kFloat32, "an input is int32 or float32");
    inputs.push_back({std::move(name), dtype == Dtype::kInt32, read_shape(in)});
    values.add(plan.add_input(inputs.back().integers));
  }
  require(!inputs.empty(), "it has no inputs");
  for (uint32_t n = in.count(33); n > 0; --n) read_step(in, arrays, plan, values);
  std::vector<int> made;
  for (uint32_t n = in.count(12); n > 0; --n) {
    std::string name = in.text();
    made.push_back(values[in.u32()]);
    outputs.push_back({std::move(name), false, read_shape(in)});
  }
  require(!outputs.empty(), "it has no outputs");
  require(in.left() == 0, "its description goes on behind its end");
  plan.finish(std::move(made));
}

}  // namespace lutra
