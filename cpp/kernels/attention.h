// Attention of one head in one sample. Included after functions.h by the vector instruction sets,
// in the anonymous namespace of each.
//
// Lanes are queries, two registers of them to a tile; keys and values are broadcast from memory, so
// both products are chains of fused multiply-adds without anything across a register:
//   scores    x[j][i]: tiles of kKeyTile keys, d runs inside
//   results   y[d][i]: tiles of kKeyTile features, j runs inside
// Between them the scores of the tile, (keys, lanes), become powers in place; they stay in the
// nearest cache for a few hundred keys. Keys that the mask hides are left out when k and v are
// copied next to each other, once for all tiles.
#pragma once

#include "planes.h"

namespace lutra {
namespace {

constexpr int32_t kQueryVectors = 2;
constexpr int32_t kQueries = kQueryVectors * kLanes;
constexpr int32_t kKeyTile = kVectorRegisters == 32 ? 8 : 6;

// From one feature to the next in the copies: an odd number of cache lines, which puts features
// into different sets of the cache.
size_t key_stride(int32_t keys) { return static_cast<size_t>(keys + 31) / 32 * 32 + 16; }

struct AttentionScratch {
  float *k, *v, *q, *p;
  int32_t* key;  // which keys they are
  size_t stride;

  AttentionScratch(uint8_t* memory, int32_t width, int32_t keys) : stride(key_stride(keys)) {
    const size_t d = static_cast<size_t>(width);
    k = reinterpret_cast<float*>(memory);
    v = k + d * stride;
    q = v + d * stride;
    p = q + d * kQueries;
    key = reinterpret_cast<int32_t*>(p + static_cast<size_t>(keys) * kQueries);
  }
};

size_t attention_bytes(int32_t width, int32_t keys) {
  const size_t d = static_cast<size_t>(width), n = static_cast<size_t>(keys);
  return (2 * d * key_stride(keys) + d * kQueries + n * kQueries + n) * sizeof(float);
}

// The first `count` of s.key of one plane, `step` floats apart.
LUTRA_INLINE void pack_plane(const AttentionScratch& s, const float* from, size_t step,
                             bool leading, int32_t count, float* to) {
  if (leading && step == 1) {
    int32_t j = 0;
    for (; j + kLanes <= count; j += kLanes) store_floats(to + j, load_floats(from + j));
    if (j < count) store_floats(to + j, load_floats(from + j, count - j), count - j);
  } else {
    for (int32_t j = 0; j < count; ++j) to[j] = from[static_cast<size_t>(s.key[j]) * step];
  }
}

// Copies the keys that may be attended; returns how many.
int32_t pack_keys(const Attention& a, const AttentionScratch& s) {
  int32_t count = 0;
  for (int32_t j = 0; j < a.keys; ++j) {
    if (!a.mask || a.mask[j] != 0) s.key[count++] = j;
  }
  if (count == 0) return 0;
  const bool leading = s.key[count - 1] == count - 1;
  for (int32_t d = 0; d < a.width; ++d) {
    const float *const k = a.k + d * a.k_stride, *const v = a.v + d * a.v_stride;
    float *const to_k = s.k + d * s.stride, *const to_v = s.v + d * s.stride;
    pack_plane(s, k, 1, leading, count, to_k);
    pack_plane(s, v, a.v_step, leading, count, to_v);
  }
  return count;
}

// Scores of kKeys keys from k, for kVectors registers of queries.
template <int kKeys, int kVectors>
LUTRA_INLINE void score_tile(const float* q, const float* k, size_t stride, int32_t width,
                             float* p) {
  Floats sum[kKeys][kVectors];
#pragma GCC unroll 8
  for (int32_t j = 0; j < kKeys; ++j) {
#pragma GCC unroll 2
    for (int32_t v = 0; v < kVectors; ++v) sum[j][v] = splat(0.0f);
  }
  for (int32_t d = 0; d < width; ++d, q += kQueries, k += stride) {
    Floats x[kVectors];
#pragma GCC unroll 2
    for (int32_t v = 0; v < kVectors; ++v) x[v] = load_floats(q + v * kLanes);
#pragma GCC unroll 8
    for (int32_t j = 0; j < kKeys; ++j) {
      const Floats one = splat(k[j]);
#pragma GCC unroll 2
      for (int32_t v = 0; v < kVectors; ++v) sum[j][v] = fmadd(x[v], one, sum[j][v]);
    }
  }
#pragma GCC unroll 8
  for (int32_t j = 0; j < kKeys; ++j) {
#pragma GCC unroll 2
    for (int32_t v = 0; v < kVectors; ++v) store_floats(p + j * kQueries + v * kLanes, sum[j][v]);
  }
}

// Scores become powers; adds them up, key by key.
template <int kVectors, class Exp>
LUTRA_INLINE void powers_of_scores(float* p, int32_t keys, const Exp& exp, const Floats* top,
                                   Floats* sum) {
  constexpr int kKeys = kSideBySide / kVectors;
  const auto place = [&](int32_t i) { return p + i / kVectors * kQueries + i % kVectors * kLanes; };
  int32_t j = 0;
  for (; j + kKeys <= keys; j += kKeys, p += kKeys * kQueries) {
    Many<Floats, kSideBySide> x;
#pragma GCC unroll 4
    for (int32_t i = 0; i < kSideBySide; ++i) {
      x.v[i] = sub(load_floats(place(i)), top[i % kVectors]);
    }
    x = exp(x);
#pragma GCC unroll 4
    for (int32_t i = 0; i < kSideBySide; ++i) {
      store_floats(place(i), x.v[i]);
      sum[i % kVectors] = add(sum[i % kVectors], x.v[i]);
    }
  }
  for (; j < keys; ++j, p += kQueries) {
#pragma GCC unroll 2
    for (int32_t v = 0; v < kVectors; ++v) {
      const Floats x = exp(Floats(sub(load_floats(place(v)), top[v])));
      store_floats(place(v), x);
      sum[v] = add(sum[v], x);
    }
  }
}

// Results of kFeatures features from v, before the division.
template <int kFeatures, int kVectors>
LUTRA_INLINE void value_tile(const float* p, const float* value, size_t stride, int32_t keys,
                             const Floats* factor, const PlaneWriter& to, int32_t feature) {
  Floats sum[kFeatures][kVectors];
#pragma GCC unroll 8
  for (int32_t d = 0; d < kFeatures; ++d) {
#pragma GCC unroll 2
    for (int32_t v = 0; v < kVectors; ++v) sum[d][v] = splat(0.0f);
  }
  for (int32_t j = 0; j < keys; ++j, p += kQueries) {
    Floats x[kVectors];
#pragma GCC unroll 2
    for (int32_t v = 0; v < kVectors; ++v) x[v] = load_floats(p + v * kLanes);
#pragma GCC unroll 8
    for (int32_t d = 0; d < kFeatures; ++d) {
      const Floats one = splat(value[static_cast<size_t>(d) * stride + static_cast<size_t>(j)]);
#pragma GCC unroll 2
      for (int32_t v = 0; v < kVectors; ++v) sum[d][v] = fmadd(x[v], one, sum[d][v]);
    }
  }
#pragma GCC unroll 8
  for (int32_t d = 0; d < kFeatures; ++d) {
    float* const y = to.place(feature + d);
#pragma GCC unroll 2
    for (int32_t v = 0; v < kVectors; ++v) {
      const int32_t left = to.count - v * kLanes;
      if (left >= kLanes) {
        store_floats(y + v * kLanes, mul(sum[d][v], factor[v]));
      } else {
        store_floats(y + v * kLanes, mul(sum[d][v], factor[v]), left);
      }
    }
    to.done(feature + d, y);
  }
}

// f(integral constant n, first) for blocks of kKeyTile of `count`, then for what is left.
template <int kSize>
struct Size {
  static constexpr int kValue = kSize;
};
template <class F>
LUTRA_INLINE void in_blocks(int32_t count, const F& f) {
  int32_t i = 0;
  for (; i + kKeyTile <= count; i += kKeyTile) f(Size<kKeyTile>(), i);
  if constexpr (kKeyTile > 4) {
    if (i + 4 <= count) {
      f(Size<4>(), i);
      i += 4;
    }
  }
  if (i + 2 <= count) {
    f(Size<2>(), i);
    i += 2;
  }
  if (i < count) f(Size<1>(), i);
}

// Queries `first`.. of one tile, over the first `keys` keys.
template <int kVectors, class Exp>
void attention_tile(const Attention& a, const Exp& exp, const AttentionScratch& s, int32_t keys,
                    int32_t first, const PlaneWriter& to) {
  const int32_t count = to.count;
  for (int32_t d = 0; d < a.width; ++d) {
    const float* const q = a.q + d * a.q_stride + first;
#pragma GCC unroll 2
    for (int32_t v = 0; v < kVectors; ++v) {
      const Floats x = load_floats(q + v * kLanes, count - v * kLanes);
      store_floats(s.q + d * kQueries + v * kLanes, mul(x, splat(a.scale)));
    }
  }
  in_blocks(keys, [&](auto size, int32_t j) {
    score_tile<decltype(size)::kValue, kVectors>(s.q, s.k + j, s.stride, a.width,
                                                 s.p + j * kQueries);
  });
  if (a.causal) {  // -inf where the key is later than the query
    float lane[kQueries];
    for (int32_t i = 0; i < kQueries; ++i) lane[i] = static_cast<float>(i);
    for (int32_t j = keys; j-- > 0 && s.key[j] > first + a.past;) {
      const Floats from = splat(static_cast<float>(s.key[j] - a.past - first));
#pragma GCC unroll 2
      for (int32_t v = 0; v < kVectors; ++v) {
        float* const x = s.p + j * kQueries + v * kLanes;
        const Mask early = less(load_floats(lane + v * kLanes), from);
        store_floats(x, choose(early, splat(-__builtin_inff()), load_floats(x)));
      }
    }
  }
  Floats top[kVectors], sum[kVectors];
#pragma GCC unroll 2
  for (int32_t v = 0; v < kVectors; ++v) {
    top[v] = splat(-__builtin_inff());
    sum[v] = splat(0.0f);
  }
  for (int32_t j = 0; j < keys; ++j) {
#pragma GCC unroll 2
    for (int32_t v = 0; v < kVectors; ++v) {
      top[v] = maximum(load_floats(s.p + j * kQueries + v * kLanes), top[v]);
    }
  }
#pragma GCC unroll 2
  for (int32_t v = 0; v < kVectors; ++v) {  // no key at all: any number will do
    top[v] = choose(less(top[v], splat(-kLargest)), splat(0.0f), top[v]);
  }
  powers_of_scores<kVectors>(s.p, keys, exp, top, sum);
  float factors[kQueries];
#pragma GCC unroll 2
  for (int32_t v = 0; v < kVectors; ++v) store_floats(factors + v * kLanes, sum[v]);
  invert(a.reciprocal, factors, kVectors * kLanes);
  Floats factor[kVectors];
#pragma GCC unroll 2
  for (int32_t v = 0; v < kVectors; ++v) {
    const Mask none = at_least(splat(0.0f), sum[v]);
    factor[v] = choose(none, splat(0.0f), load_floats(factors + v * kLanes));
  }
  in_blocks(a.width, [&](auto size, int32_t d) {
    value_tile<decltype(size)::kValue, kVectors>(s.p, s.v + static_cast<size_t>(d) * s.stride,
                                                 s.stride, keys, factor, to, d);
  });
}

void attention(const Attention& a, int32_t first, int32_t last, const PlaneOutput& out,
               uint8_t* memory) {
  const AttentionScratch s(memory, a.width, a.keys);
  const int32_t all = pack_keys(a, s);
  float scratch[kQueries];
  with_exp(a.exp, [&](const auto& exp) {
    for (int32_t i = first; i < last; i += kQueries) {
      const int32_t count = last - i < kQueries ? last - i : kQueries;
      int32_t keys = all;
      while (a.causal && keys > 0 && s.key[keys - 1] >= i + count + a.past) --keys;
      const PlaneWriter to{out, static_cast<size_t>(i), count, scratch};
      if (count > kLanes) {
        attention_tile<kQueryVectors>(a, exp, s, keys, i, to);
      } else {
        attention_tile<1>(a, exp, s, keys, i, to);
      }
    }
  });
}

}  // namespace
}  // namespace lutra
