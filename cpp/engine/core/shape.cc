#include "engine/core/shape.h"

#include <algorithm>
#include <cstring>

#ifdef __SSE2__  // part of every x86-64
#include <emmintrin.h>
#endif

namespace lutra {

namespace {

#ifdef __SSE2__
constexpr int64_t kTile = 16;  // floats of a cache line

// A tile of 16 x 16. Both sides are touched a line at a time: where steps are powers of two, the
// lines of many rows do not fit in the cache together.
inline void transpose_tile(const float* from, int64_t from_step, float* to, int64_t to_step) {
  alignas(64) float turned[kTile * kTile];
  for (int64_t i = 0; i < kTile; i += 4) {
    const float* const x = from + i * from_step;
    for (int64_t j = 0; j < kTile; j += 4) {
      __m128 r0 = _mm_loadu_ps(x + j), r1 = _mm_loadu_ps(x + from_step + j),
             r2 = _mm_loadu_ps(x + 2 * from_step + j), r3 = _mm_loadu_ps(x + 3 * from_step + j);
      _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
      float* const y = turned + j * kTile + i;
      _mm_store_ps(y, r0);
      _mm_store_ps(y + kTile, r1);
      _mm_store_ps(y + 2 * kTile, r2);
      _mm_store_ps(y + 3 * kTile, r3);
    }
  }
  for (int64_t j = 0; j < kTile; ++j) {
    std::memcpy(to + j * to_step, turned + j * kTile, kTile * sizeof(float));
  }
}
#endif

// to[j * to_step + i] = from[i * from_step + j] for i < rows, j < columns
template <class T>
void transpose_block(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t rows,
                     int64_t columns) {
  int64_t i = 0;
#ifdef __SSE2__
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; i + 4 <= rows; i += 4) {
      const float* const x = from + i * from_step;
      int64_t j = 0;
      for (; j + 4 <= columns; j += 4) {
        __m128 r0 = _mm_loadu_ps(x + j), r1 = _mm_loadu_ps(x + from_step + j),
               r2 = _mm_loadu_ps(x + 2 * from_step + j), r3 = _mm_loadu_ps(x + 3 * from_step + j);
        _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
        float* const y = to + j * to_step + i;
        _mm_storeu_ps(y, r0);
        _mm_storeu_ps(y + to_step, r1);
        _mm_storeu_ps(y + 2 * to_step, r2);
        _mm_storeu_ps(y + 3 * to_step, r3);
      }
      for (; j < columns; ++j) {
        for (int64_t k = 0; k < 4; ++k) to[j * to_step + i + k] = x[k * from_step + j];
      }
    }
  }
#endif
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * to_step + i] = from[i * from_step + j];
  }
}

// The same, in blocks that stay in the cache.
template <class T>
void transpose(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t rows,
               int64_t columns) {
  constexpr int64_t kBlock = 16;
  for (int64_t i = 0; i < rows; i += kBlock) {
    const int64_t height = std::min(kBlock, rows - i);
    for (int64_t j = 0; j < columns; j += kBlock) {
      const int64_t width = std::min(kBlock, columns - j);
      const T* const x = from + i * from_step + j;
      T* const y = to + j * to_step + i;
#ifdef __SSE2__
      if constexpr (sizeof(T) == sizeof(float)) {
        if (height == kTile && width == kTile) {
          transpose_tile(x, from_step, y, to_step);
          continue;
        }
      }
#endif
      transpose_block(x, from_step, y, to_step, height, width);
    }
  }
}

// to[i] = from[2 i] for i < n
template <class T>
void take_every_second(const T* from, T* to, int64_t n) {
  int64_t i = 0;
#ifdef __SSE2__
  if constexpr (sizeof(T) == sizeof(float)) {
    // Eight are read for four; behind the last that counts there may be none.
    for (; i + 4 < n; i += 4) {
      const __m128 low = _mm_loadu_ps(from + 2 * i), high = _mm_loadu_ps(from + 2 * i + 4);
      _mm_storeu_ps(to + i, _mm_shuffle_ps(low, high, _MM_SHUFFLE(2, 0, 2, 0)));
    }
  }
#endif
  for (; i < n; ++i) to[i] = from[2 * i];
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
    } else if (fs[axis] == 2 && ts[axis] == 1) {
      take_every_second(from, to, n);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i * ts[axis]] = from[i * fs[axis]];
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    copy_axis(shape, axis + 1, from + i * fs[axis], fs, to + i * ts[axis], ts);
  }
}

// Of a copy: the axes that it walks along.
struct Walk {
  Shape shape;
  Dims from{}, to{};
};

// Axes of one entry say nothing; the others are visited in the order of the target's memory, and
// those that follow each other on both sides are one.
Walk walk_of(const Shape& shape, const Dims& from_strides, const Dims& to_strides) {
  std::array<int, kMaxRank> order{};
  int axes = 0;
  for (int i = 0; i < shape.rank; ++i) {
    if (shape[i] == 1) continue;
    int at = axes++;
    for (; at > 0 && to_strides[order[at - 1]] < to_strides[i]; --at) order[at] = order[at - 1];
    order[at] = i;
  }
  Walk walk;
  Shape& merged = walk.shape;
  Dims &fs = walk.from, &ts = walk.to;
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
  // Where the source is consecutive along another axis than the target, blocks of both are turned.
  const int last = merged.rank - 1;
  for (int i = 0; i < last - 1 && fs[last] != 1 && ts[last] == 1; ++i) {
    if (fs[i] != 1) continue;
    std::rotate(merged.dims.begin() + i, merged.dims.begin() + i + 1, merged.dims.begin() + last);
    std::rotate(fs.begin() + i, fs.begin() + i + 1, fs.begin() + last);
    std::rotate(ts.begin() + i, ts.begin() + i + 1, ts.begin() + last);
    break;
  }
  return walk;
}

}  // namespace

template <class T>
void copy_strided(const Shape& shape, const T* from, const Dims& from_strides, T* to,
                  const Dims& to_strides) {
  if (shape.size() == 0) return;
  const Walk walk = walk_of(shape, from_strides, to_strides);
  if (walk.shape.rank == 0) {
    *to = *from;
    return;
  }
  copy_axis(walk.shape, 0, from, walk.from, to, walk.to);
}

template void copy_strided(const Shape&, const float*, const Dims&, float*, const Dims&);
template void copy_strided(const Shape&, const uint8_t*, const Dims&, uint8_t*, const Dims&);

}  // namespace lutra
