// AVX2: dense layers, int8 and float32. Private to avx2.cc.
#pragma once

#include "avx2_common.h"

namespace lutra {
namespace {

// --- int8 ----------------------------------------------------------------------------------------
//
// Four entries per dword. vpmaddubsw adds two products in 16 bits (2 * 127 * 127 fits), vpmaddwd
// with ones makes 32 bits of two such sums, vpaddd adds: three instructions for 32 products, bound
// by the two multipliers. Where the weights of two neighbouring quads are small enough that their
// sums fit 16 bits together, which trained weights nearly always are, they are added before
// vpmaddwd: five instructions, three of them multiplications, for 64 products.
//
// Packed weights: [8 outputs][quad of entries][output][4 entries], then a byte for each 4 outputs
// and run of 8 quads: are the weights so small there? Gathered values: [16 rows][quad][row][4
// entries]. What is missing has weight zero.

constexpr int32_t kDenseBlock = 8;
constexpr int32_t kRunQuads = 8;

LUTRA_INLINE int32_t quads_of(int32_t depth) { return (depth + 3) / 4; }

LUTRA_INLINE size_t weight_bytes(int32_t depth, int32_t outputs) {
  return static_cast<size_t>(round_up(outputs, kDenseBlock)) * quads_of(depth) * 4;
}

LUTRA_INLINE int32_t runs_of(int32_t depth) {
  return (quads_of(depth) + kRunQuads - 1) / kRunQuads;
}

size_t dense8_bytes(int32_t depth, int32_t outputs) {
  const int32_t blocks = round_up(outputs, kDenseBlock) / kBlock;
  return weight_bytes(depth, outputs) + static_cast<size_t>(blocks) * runs_of(depth);
}

// Can the vpmaddubsw sums of quads 2i and 2i + 1 always be added in 16 bits? (Values are at most
// 127.) `count` weights from a multiple of 8.
bool small_weights(const int8_t* weights, int32_t count) {
  for (int32_t d = 0; d < count; d += 8) {
    int32_t sum[2] = {0, 0};  // of entries 0, 1, 4, 5 and 2, 3, 6, 7
    for (int32_t i = 0; i < 8 && d + i < count; ++i) {
      sum[i / 2 % 2] += weights[d + i] < 0 ? -weights[d + i] : weights[d + i];
    }
    if (127 * sum[0] > INT16_MAX || 127 * sum[1] > INT16_MAX) return false;
  }
  return true;
}

void pack_dense8(int32_t depth, int32_t outputs, const int8_t* weights, uint8_t* packed) {
  uint8_t* small = packed + weight_bytes(depth, outputs);
  for (int32_t m = 0; m < round_up(outputs, kDenseBlock); m += kBlock) {
    for (int32_t d = 0; d < depth; d += 4 * kRunQuads, ++small) {
      const int32_t count = depth - d < 4 * kRunQuads ? depth - d : 4 * kRunQuads;
      *small = 1;
      for (int32_t j = m; j < m + kBlock && j < outputs; ++j) {
        *small &= small_weights(weights + static_cast<size_t>(j) * depth + d, count);
      }
    }
  }
  for (int32_t block = 0; block < outputs; block += kDenseBlock) {
    for (int32_t quad = 0; quad < depth; quad += 4) {
      for (int32_t i = 0; i < kDenseBlock * 4; ++i) {
        const int32_t m = block + i / 4, d = quad + i % 4;
        const bool there = m < outputs && d < depth;
        *packed++ = there ? static_cast<uint8_t>(weights[static_cast<size_t>(m) * depth + d]) : 0;
      }
    }
  }
}

size_t gather8_bytes(int32_t depth) { return static_cast<size_t>(quads_of(depth)) * 4 * kRows; }

// Four planes of 32 rows become two groups of 16 rows, two registers each.
LUTRA_INLINE void interleave(const __m256i* p, uint8_t* first, uint8_t* second) {
  const __m256i lo01 = _mm256_unpacklo_epi8(p[0], p[1]), hi01 = _mm256_unpackhi_epi8(p[0], p[1]);
  const __m256i lo23 = _mm256_unpacklo_epi8(p[2], p[3]), hi23 = _mm256_unpackhi_epi8(p[2], p[3]);
  const __m256i q0 = _mm256_unpacklo_epi16(lo01, lo23);  // rows 0..3, 16..19
  const __m256i q1 = _mm256_unpackhi_epi16(lo01, lo23);
  const __m256i q2 = _mm256_unpacklo_epi16(hi01, hi23);
  const __m256i q3 = _mm256_unpackhi_epi16(hi01, hi23);
  store(first, _mm256_permute2x128_si256(q0, q1, 0x20));
  store(first + 32, _mm256_permute2x128_si256(q2, q3, 0x20));
  if (!second) return;
  store(second, _mm256_permute2x128_si256(q0, q1, 0x31));
  store(second + 32, _mm256_permute2x128_si256(q2, q3, 0x31));
}

template <typename Loader>
LUTRA_INLINE void gather_rows(int32_t depth, int32_t taps, const Patch& p, bool one,
                              const Loader& rows, uint8_t* to) {
  const int32_t quads = quads_of(depth);
  Entries walk(p, taps, 0);
  for (int32_t i = 0; i < quads; ++i, to += 64) {
    __m256i x[4];
    for (int32_t j = 0; j < 4; ++j) {
      if (4 * i + j >= depth) {
        x[j] = _mm256_setzero_si256();
      } else {
        const uint8_t* const at = walk.next();
        x[j] = one ? _mm256_castsi128_si256(rows.half(at)) : rows.wide(at);
      }
    }
    interleave(x, to, one ? nullptr : to + static_cast<size_t>(quads) * 64);
  }
}

void gather8(int32_t depth, int32_t taps, const Patch& p, uint8_t* gathered) {
  for (int32_t row = 0; row < p.rows; row += kSubRows) {
    Rows rows;
    find_rows(p, row, &rows);
    uint8_t* const to = gathered + static_cast<size_t>(row / 16) * quads_of(depth) * 64;
    with_rows(rows, [&](const auto& loader) {
      gather_rows(depth, taps, p, narrow(p.rows - row), loader, to);
    });
  }
}

LUTRA_INLINE __m256i add_pairs(__m256i sum, __m256i pairs) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
LUTRA_INLINE __m256i dot4(__m256i sum, __m256i x, __m256i w) {
  return add_pairs(sum, _mm256_maddubs_epi16(x, w));
}

// A run of quads for 4 outputs x 16 rows: 8 sums. Weights are broadcast, 32 bytes from quad to
// quad.
LUTRA_INLINE void add_run(const uint8_t* w, const uint8_t* x, int32_t quads, bool small,
                          __m256i (*sum)[2]) {
  for (; small && quads >= 2; quads -= 2, x += 128, w += 64) {
    for (int32_t j = 0; j < kBlock; ++j) {
      const __m256i w0 = broadcast_word(w + 4 * j), w1 = broadcast_word(w + 32 + 4 * j);
      for (int32_t h = 0; h < 2; ++h) {
        const __m256i a = _mm256_maddubs_epi16(load(x + 32 * h), w0);
        const __m256i b = _mm256_maddubs_epi16(load(x + 64 + 32 * h), w1);
        sum[j][h] = add_pairs(sum[j][h], _mm256_add_epi16(a, b));
      }
    }
  }
  for (; quads > 0; --quads, x += 64, w += 32) {
    const __m256i x0 = load(x), x1 = load(x + 32);
    for (int32_t j = 0; j < kBlock; ++j) {
      const __m256i v = broadcast_word(w + 4 * j);
      sum[j][0] = dot4(sum[j][0], x0, v);
      sum[j][1] = dot4(sum[j][1], x1, v);
    }
  }
}

// The rows that are left of the last 16, where they are few: 9 of a 3x3 map, 4 of 6x6, 1 of 7x7.
// Then registers hold 8 outputs of a row, and the sums are turned around for the epilogue.
constexpr int32_t kMostFew = 10;

// x[i]: lanes are columns -> x[column]: lanes are rows
LUTRA_INLINE void turn(__m256i* x) {
  __m256i a[8], b[8];
  LUTRA_UNROLL for (int32_t i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
  }
  LUTRA_UNROLL for (int32_t i = 0; i < 8; i += 4) {
    b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  LUTRA_UNROLL for (int32_t i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2x128_si256(b[i], b[4 + i], 0x20);
    x[4 + i] = _mm256_permute2x128_si256(b[i], b[4 + i], 0x31);
  }
}

// A run of quads for 8 outputs of kCount rows.
template <int kCount>
LUTRA_INLINE void add_few(const uint8_t* w, const uint8_t* x, int32_t quads, bool small,
                          __m256i* sum) {
  for (; small && quads >= 2; quads -= 2, x += 128, w += 64) {
    const __m256i w0 = load(w), w1 = load(w + 32);
    LUTRA_UNROLL for (int32_t r = 0; r < kCount; ++r) {
      const __m256i a = _mm256_maddubs_epi16(broadcast_word(x + 4 * r), w0);
      const __m256i b = _mm256_maddubs_epi16(broadcast_word(x + 64 + 4 * r), w1);
      sum[r] = add_pairs(sum[r], _mm256_add_epi16(a, b));
    }
  }
  for (; quads > 0; --quads, x += 64, w += 32) {
    const __m256i v = load(w);
    LUTRA_UNROLL for (int32_t r = 0; r < kCount; ++r) {
      sum[r] = dot4(sum[r], broadcast_word(x + 4 * r), v);
    }
  }
}

// `first` is a multiple of 8; x: the 16 rows that begin with `row`.
template <int kCount>
void dense8_few(int32_t depth, int32_t outputs, const uint8_t* packed, const uint8_t* x,
                int32_t first, int32_t last, int32_t row, const Finish& finish) {
  const int32_t quads = quads_of(depth), runs = runs_of(depth);
  for (int32_t m = first; m < last; m += kDenseBlock) {
    const uint8_t* const w = packed + static_cast<size_t>(m / kDenseBlock) * quads * 32;
    const uint8_t* const small =
        packed + weight_bytes(depth, outputs) + static_cast<size_t>(m / kBlock) * runs;
    __m256i sum[kCount];
    LUTRA_UNROLL for (int32_t r = 0; r < kCount; ++r) sum[r] = _mm256_setzero_si256();
    for (int32_t i = 0; i < runs; ++i) {
      const int32_t left = quads - i * kRunQuads;
      add_few<kCount>(w + i * kRunQuads * 32, x + i * kRunQuads * 64,
                      left < kRunQuads ? left : kRunQuads, small[i] & small[runs + i], sum);
    }
    __m256i rows[2][8];
    LUTRA_UNROLL for (int32_t r = 0; r < 16; ++r) {
      rows[r / 8][r % 8] = r < kCount ? sum[r] : _mm256_setzero_si256();
    }
    turn(rows[0]);
    if (kCount > 8) turn(rows[1]);
    for (int32_t j = 0; j < kDenseBlock && m + j < last; ++j) {
      const __m256i both[2] = {rows[0][j], rows[1][j]};
      finish.sums<2>(m + j, row, 0, both);
    }
  }
}

void dense8(int32_t depth, int32_t outputs, const uint8_t* packed, const uint8_t* gathered,
            int32_t first, int32_t last, const Epilogue& e) {
  const Finish finish(e);
  const int32_t quads = quads_of(depth);
  constexpr int32_t kTurn = 96;  // multiply-adds of a register that a turn is worth
  const int32_t rest = e.rows % 16;
  const bool few =
      rest > 0 && rest <= kMostFew && first % kDenseBlock == 0 && (16 - rest) * quads >= kTurn;
  const int32_t rows = few ? e.rows - rest : e.rows;
  for (int32_t m = first; m < last && rows > 0; m += kBlock) {
    const uint8_t* const w =
        packed + static_cast<size_t>(m / kDenseBlock) * quads * 32 + m % kDenseBlock * 4;
    const uint8_t* const small =
        packed + weight_bytes(depth, outputs) + static_cast<size_t>(m / kBlock) * runs_of(depth);
    for (int32_t row = 0; row < rows; row += 16) {
      const uint8_t* const x = gathered + static_cast<size_t>(row / 16) * quads * 64;
      __m256i sum[kBlock][2];
      for (auto& pair : sum) pair[0] = pair[1] = _mm256_setzero_si256();
      for (int32_t i = 0; i < quads; i += kRunQuads) {
        add_run(w + i * 32, x + i * 64, quads - i < kRunQuads ? quads - i : kRunQuads,
                small[i / kRunQuads] != 0, sum);
      }
      for (int32_t j = 0; j < kBlock && m + j < last; ++j) finish.sums<2>(m + j, row, 0, sum[j]);
    }
  }
  if (!few) return;
  using Kernel = void (*)(int32_t, int32_t, const uint8_t*, const uint8_t*, int32_t, int32_t,
                          int32_t, const Finish&);
  constexpr Kernel kernels[kMostFew] = {dense8_few<1>, dense8_few<2>, dense8_few<3>, dense8_few<4>,
                                        dense8_few<5>, dense8_few<6>, dense8_few<7>, dense8_few<8>,
                                        dense8_few<9>, dense8_few<10>};
  const uint8_t* const x = gathered + static_cast<size_t>(rows / 16) * quads * 64;
  kernels[rest - 1](depth, outputs, packed, x, first, last, rows, finish);
}

// Four blocks of 8 outputs side by side, outputs in the lanes: four streams of weights.
template <int kBlocks>
LUTRA_INLINE void dense_row(const uint8_t* w, size_t block, const uint8_t* x, int32_t quads,
                            __m256i* sum) {
  for (int32_t j = 0; j < kBlocks; ++j) sum[j] = _mm256_setzero_si256();
  for (int32_t i = 0; i < quads; ++i) {
    const __m256i v = broadcast_word(x + 4 * i);
    for (int32_t j = 0; j < kBlocks; ++j) sum[j] = dot4(sum[j], v, load(w + j * block + 32 * i));
  }
}

void dense8_row(int32_t depth, int32_t, const uint8_t* packed, const uint8_t* x, int32_t first,
                int32_t last, int32_t* sums) {
  const int32_t quads = quads_of(depth);
  const size_t block = static_cast<size_t>(quads) * 32;
  __m256i sum[4];
  int32_t m = first;
  while (m < last) {
    const uint8_t* const w = packed + static_cast<size_t>(m / kDenseBlock) * block;
    if (m % kDenseBlock == 0 && m + 32 <= last) {
      dense_row<4>(w, block, x, quads, sum);
      for (int32_t j = 0; j < 4; ++j) store(sums + m - first + 8 * j, sum[j]);
      m += 32;
      continue;
    }
    dense_row<1>(w, block, x, quads, sum);
    int32_t lanes[8];
    store(lanes, sum[0]);
    do {
      sums[m - first] = lanes[m % kDenseBlock];
    } while (++m < last && m % kDenseBlock != 0);
  }
}

// --- float32 -------------------------------------------------------------------------------------

// 16 rows x 4 outputs at a time: 8 accumulators, 2 loads and 4 broadcasts for 8 multiply-adds.
void gemm(const float* patch, size_t depth, const float* weights, int32_t outputs,
          const Epilogue& e) {
  const Finish finish(e);
  for (int32_t m = 0; m < outputs; m += kGemmOutputs, weights += depth * kGemmOutputs) {
    for (int32_t row = 0; row < e.rows; row += 16) {
      __m256 sum[kGemmOutputs][2];
      for (auto& pair : sum) pair[0] = pair[1] = _mm256_setzero_ps();
      for (size_t d = 0; d < depth; ++d) {
        const __m256 x0 = _mm256_loadu_ps(patch + d * kRows + row);
        const __m256 x1 = _mm256_loadu_ps(patch + d * kRows + row + 8);
        for (int32_t j = 0; j < kGemmOutputs; ++j) {
          const __m256 w = _mm256_set1_ps(weights[d * kGemmOutputs + j]);
          sum[j][0] = _mm256_fmadd_ps(w, x0, sum[j][0]);
          sum[j][1] = _mm256_fmadd_ps(w, x1, sum[j][1]);
        }
      }
      for (int32_t j = 0; j < kGemmOutputs && m + j < outputs; ++j) {
        finish.sums<2>(m + j, row, sum[j]);
      }
    }
  }
}

void linear(const float* x, size_t x_stride, size_t depth, const float* weights, const float* bias,
            int32_t outputs, float* y) {
  for (int32_t m = 0; m < outputs; m += kLinearOutputs) {
    __m256 sum[8];
    for (__m256& s : sum) s = _mm256_setzero_ps();
    for (size_t d = 0; d < depth; ++d, weights += kLinearOutputs) {
      const __m256 v = _mm256_set1_ps(x[d * x_stride]);
      for (int32_t q = 0; q < 8; ++q) {
        sum[q] = _mm256_fmadd_ps(_mm256_loadu_ps(weights + 8 * q), v, sum[q]);
      }
    }
    for (int32_t q = 0; q < 8; ++q) _mm256_storeu_ps(y + m + 8 * q, sum[q]);
    for (int32_t j = m; j < m + kLinearOutputs && j < outputs; ++j) y[j] = y[j] + bias[j];
  }
}

}  // namespace
}  // namespace lutra
