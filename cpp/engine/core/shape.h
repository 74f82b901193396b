// Shapes and the engine's storage order.
//
// A value of shape (N, C, ...) is stored channel first: (C, N, ...). The pixels of the whole batch
// are then consecutive in a channel's plane, so that the rows of a tile never stop at the end of an
// image, and a convolution writes its outputs plane by plane. The channels of a sequence (N, T, D)
// are its features: it is stored (D, N, T), and the tokens of the whole batch are the rows.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>

namespace lutra {

inline constexpr int kMaxRank = 8;
using Dims = std::array<int64_t, kMaxRank>;

struct Shape {
  int rank = 0;
  Dims dims{};

  Shape() = default;
  Shape(std::initializer_list<int64_t> list) {
    for (int64_t d : list) dims[static_cast<size_t>(rank++)] = d;
  }
  int64_t operator[](int axis) const { return dims[axis]; }
  int64_t& operator[](int axis) { return dims[axis]; }
  bool operator==(const Shape&) const = default;
  int64_t batch() const { return rank > 0 ? dims[0] : 1; }
  int64_t inner() const { return product(2); }  // of the axes after the second
  int64_t size() const { return product(0); }   // of too many elements: the largest number
  std::string text() const {                    // "(2, 3, 32, 32)"
    std::string s = "(";
    for (int i = 0; i < rank; ++i) s.append(i ? ", " : "").append(std::to_string(dims[i]));
    return s.append(")");
  }

 private:
  int64_t product(int first) const {
    int64_t n = 1;
    for (int i = first; i < rank; ++i) {
      if (dims[i] > 0 && n > std::numeric_limits<int64_t>::max() / dims[i]) {
        return std::numeric_limits<int64_t>::max();
      }
      n *= dims[i];
    }
    return n;
  }
};

// The axis whose entries are planes, for a rank of at least 2.
inline int plane_axis(int rank) { return rank == 3 ? 2 : 1; }
// The logical axis that comes k-th in memory, the longest steps first.
inline int storage_axis(int rank, int k) {
  if (rank < 2) return k;
  if (k == 0) return plane_axis(rank);
  return k <= plane_axis(rank) ? k - 1 : k;
}
// Of the engine's order, in elements, by logical axis.
inline Dims storage_strides(const Shape& shape) {
  Dims strides{};
  int64_t step = 1;
  for (int k = shape.rank - 1; k >= 0; --k) {
    const int axis = storage_axis(shape.rank, k);
    strides[axis] = step;
    step *= shape[axis];
  }
  return strides;
}
// Of a C-contiguous array.
inline Dims row_major_strides(const Shape& shape) {
  Dims strides{};
  int64_t step = 1;
  for (int i = shape.rank - 1; i >= 0; --i) {
    strides[i] = step;
    step *= shape[i];
  }
  return strides;
}

// Copies shape.size() elements between two strided arrays of float or uint8_t.
template <class T>
void copy_strided(const Shape& shape, const T* from, const Dims& from_strides, T* to,
                  const Dims& to_strides);

}  // namespace lutra
