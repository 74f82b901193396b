#include "shape.h"

#include <cstring>

namespace lutra {

Shape::Shape(std::initializer_list<int64_t> list) {
  for (int64_t d : list) dims[rank++] = d;
}

int64_t Shape::inner() const {
  int64_t n = 1;
  for (int i = 2; i < rank; ++i) n *= dims[i];
  return n;
}

int64_t Shape::size() const {
  int64_t n = 1;
  for (int i = 0; i < rank; ++i) n *= dims[i];
  return n;
}

std::string Shape::text() const {
  std::string s = "(";
  for (int i = 0; i < rank; ++i) s += (i ? ", " : "") + std::to_string(dims[i]);
  return s + ")";
}

Dims row_major_strides(const Shape& shape) {
  Dims strides{};
  int64_t step = 1;
  for (int i = shape.rank - 1; i >= 0; --i) {
    strides[i] = step;
    step *= shape[i];
  }
  return strides;
}

Dims storage_strides(const Shape& shape) {
  Dims strides = row_major_strides(shape);
  if (shape.rank > 1) {
    strides[0] = shape.inner();
    strides[1] = shape.inner() * shape[0];
  }
  return strides;
}

namespace {

void copy_axis(const Shape& shape, int axis, const float* from, const Dims& fs, float* to,
               const Dims& ts) {
  const int64_t n = shape[axis];
  if (axis + 1 == shape.rank) {
    if (fs[axis] == 1 && ts[axis] == 1) {
      std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
    } else {
      for (int64_t i = 0; i < n; ++i) to[i * ts[axis]] = from[i * fs[axis]];
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    copy_axis(shape, axis + 1, from + i * fs[axis], fs, to + i * ts[axis], ts);
  }
}

}  // namespace

void copy_strided(const Shape& shape, const float* from, const Dims& from_strides, float* to,
                  const Dims& to_strides) {
  if (shape.size() == 0) return;
  if (shape.rank == 0) {
    *to = *from;
    return;
  }
  copy_axis(shape, 0, from, from_strides, to, to_strides);
}

}  // namespace lutra
