#include "shape.h"

#include <algorithm>
#include <cstring>

#ifdef __SSE2__  // part of every x86-64
#include <emmintrin.h>
#endif

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
  Dims strides{};
  int64_t step = 1;
  for (int k = shape.rank - 1; k >= 0; --k) {
    const int axis = storage_axis(shape.rank, k);
    strides[axis] = step;
    step *= shape[axis];
  }
  return strides;
}

namespace {

// to[j * to_step + i] = from[i * from_step + j] for i < rows, j < columns, in blocks that stay in
// the cache.
template <class T>
void transpose(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t rows,
               int64_t columns) {
  constexpr int64_t kBlock = 32;
  for (int64_t i0 = 0; i0 < rows; i0 += kBlock) {
    const int64_t i1 = std::min(rows, i0 + kBlock);
    for (int64_t j0 = 0; j0 < columns; j0 += kBlock) {
      const int64_t j1 = std::min(columns, j0 + kBlock);
      int64_t i = i0;
#ifdef __SSE2__
      for (; sizeof(T) == sizeof(float) && i + 4 <= i1; i += 4) {
        const T* const x = from + i * from_step;
        int64_t j = j0;
        for (; j + 4 <= j1; j += 4) {
          const float* const f = reinterpret_cast<const float*>(x) + j;
          __m128 r0 = _mm_loadu_ps(f), r1 = _mm_loadu_ps(f + from_step),
                 r2 = _mm_loadu_ps(f + 2 * from_step), r3 = _mm_loadu_ps(f + 3 * from_step);
          _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
          float* const y = reinterpret_cast<float*>(to) + j * to_step + i;
          _mm_storeu_ps(y, r0);
          _mm_storeu_ps(y + to_step, r1);
          _mm_storeu_ps(y + 2 * to_step, r2);
          _mm_storeu_ps(y + 3 * to_step, r3);
        }
        for (; j < j1; ++j) {
          for (int64_t k = 0; k < 4; ++k) to[j * to_step + i + k] = x[k * from_step + j];
        }
      }
#endif
      for (; i < i1; ++i) {
        for (int64_t j = j0; j < j1; ++j) to[j * to_step + i] = from[i * from_step + j];
      }
    }
  }
}

template <class T>
void copy_axis(const Shape& shape, int axis, const T* from, const Dims& fs, T* to, const Dims& ts) {
  const int64_t n = shape[axis];
  if (axis + 2 == shape.rank && fs[axis + 1] == 1 && ts[axis] == 1) {
    return transpose(from, fs[axis], to, ts[axis + 1], n, shape[axis + 1]);
  }
  if (axis + 2 == shape.rank && fs[axis] == 1 && ts[axis + 1] == 1) {
    return transpose(from, fs[axis + 1], to, ts[axis], shape[axis + 1], n);
  }
  if (axis + 1 == shape.rank) {
    if (fs[axis] == 1 && ts[axis] == 1) {
      std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
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

template <class T>
void copy_strided(const Shape& shape, const T* from, const Dims& from_strides, T* to,
                  const Dims& to_strides) {
  if (shape.size() == 0) return;
  // Axes of one entry say nothing; the others are visited in the order of the target's memory, and
  // those that follow each other on both sides are one.
  std::array<int, kMaxRank> order{};
  int axes = 0;
  for (int i = 0; i < shape.rank; ++i) {
    if (shape[i] != 1) order[axes++] = i;
  }
  std::stable_sort(order.begin(), order.begin() + axes,
                   [&](int a, int b) { return to_strides[a] > to_strides[b]; });
  Shape merged;
  Dims fs{}, ts{};
  for (int k = 0; k < axes; ++k) {
    const int i = order[k];
    const int64_t n = shape[i];
    const int last = merged.rank - 1;
    if (last >= 0 && fs[last] == n * from_strides[i] && ts[last] == n * to_strides[i]) {
      merged[last] *= n;
    } else {
      merged[merged.rank++] = n;
    }
    fs[merged.rank - 1] = from_strides[i];
    ts[merged.rank - 1] = to_strides[i];
  }
  if (merged.rank == 0) {
    *to = *from;
    return;
  }
  // Where the source is consecutive along another axis than the target, blocks of both are turned.
  const int last = merged.rank - 1;
  for (int i = 0; fs[last] != 1 && ts[last] == 1 && i < last - 1; ++i) {
    if (fs[i] != 1) continue;
    std::rotate(merged.dims.begin() + i, merged.dims.begin() + i + 1, merged.dims.begin() + last);
    std::rotate(fs.begin() + i, fs.begin() + i + 1, fs.begin() + last);
    std::rotate(ts.begin() + i, ts.begin() + i + 1, ts.begin() + last);
    break;
  }
  copy_axis(merged, 0, from, fs, to, ts);
}

template void copy_strided(const Shape&, const float*, const Dims&, float*, const Dims&);
template void copy_strided(const Shape&, const uint8_t*, const Dims&, uint8_t*, const Dims&);

}  // namespace lutra
