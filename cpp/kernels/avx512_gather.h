// Values of a tile by their addresses, straight from the planes. Private to avx512.cc.
//
// A "quad" is a register of 16 rows x 4 entries: byte 4 i + t is entry t of row i, which is what
// vpdpbusd wants. An address is (offset of the entry) + (offset of the row), so if all 64 lie
// within 64 bytes, the quad is one load and one vpermb with index (row part) + (entry part).
// Otherwise the rows are cut into segments and the entries into sources until that holds for each
// pair of a segment and a source, and masked permutes merge the pairs. Exact for any addresses; the
// usual case is one pair.
#pragma once

#include "avx512_common.h"

namespace lutra {
namespace {

constexpr int32_t kRowReach = 60;  // of a segment; leaves room for four neighbouring entries

struct RowBlock {
  __m512i offset;  // byte 4 i + t: row i - base of its segment
  int32_t segments;
  int32_t base[16];
  __mmask64 rows[16];
};

struct Rows {
  int32_t blocks;
  int32_t reach;  // the largest row part of an index
  bool single;    // one segment in each block
  RowBlock block[4];
};

struct Quad {
  int32_t sources;
  int32_t offset;  // byte t: entry t - base of its source
  int64_t base[4];
  __mmask64 entries[4];
};

void find_rows(const Patch& p, Rows& rows) {
  const __m512i splat = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
  rows.blocks = row_blocks(p.rows);
  rows.reach = 0;
  rows.single = true;
  for (int32_t b = 0; b < rows.blocks; ++b) {
    RowBlock& block = rows.block[b];
    const int32_t* const row = p.row + 16 * b;
    const __m512i r = _mm512_loadu_si512(row), reach = _mm512_set1_epi32(kRowReach);
    __m512i offset = _mm512_setzero_si512();
    uint32_t left = 0xffff;
    block.segments = 0;
    do {
      const int32_t base = row[__builtin_ctz(left)];
      const __m512i from = _mm512_sub_epi32(r, _mm512_set1_epi32(base));
      const __mmask16 in = _mm512_mask_cmple_epi32_mask(static_cast<__mmask16>(left), from, reach);
      offset = _mm512_mask_mov_epi32(offset, in, from);
      block.base[block.segments] = base;
      block.rows[block.segments++] = _mm512_movepi8_mask(_mm512_movm_epi32(in));
      left &= ~static_cast<uint32_t>(in);
    } while (left);
    const int32_t most = _mm512_reduce_max_epi32(offset);
    if (most > rows.reach) rows.reach = most;
    rows.single &= block.segments == 1;
    block.offset = _mm512_shuffle_epi8(offset, splat);
  }
}

// Entries first .. first + count - 1 (at most 4; those missing repeat the first). `room` is what
// the rows leave of the 64 bytes.
void find_quad(const Patch& p, int32_t taps, int32_t first, int32_t count, int32_t room, Quad& q) {
  int64_t at[4];
  int32_t tap = first % taps;
  int64_t plane = first / taps * p.plane;
  for (int32_t t = 0; t < 4; ++t) {
    at[t] = t < count ? plane + p.tap[tap] : at[0];
    if (++tap == taps) {
      tap = 0;
      plane += p.plane;
    }
  }
  uint32_t left = 15, offset = 0;
  q.sources = 0;
  do {
    int64_t base = INT64_MAX;
    for (int32_t t = 0; t < 4; ++t) {
      if ((left >> t & 1) && at[t] < base) base = at[t];
    }
    uint32_t in = 0;
    for (int32_t t = 0; t < 4; ++t) {
      if (!(left >> t & 1) || at[t] - base > room) continue;
      in |= 1u << t;
      offset |= static_cast<uint32_t>(at[t] - base) << 8 * t;
    }
    q.base[q.sources] = base;
    q.entries[q.sources++] = in * 0x1111111111111111ull;
    left &= ~in;
  } while (left);
  q.offset = static_cast<int32_t>(offset);
}

__m512i gather_quad(const uint8_t* planes, const Quad& q, const RowBlock& block) {
  const __m512i index = _mm512_add_epi8(block.offset, _mm512_set1_epi32(q.offset));
  if (q.sources * block.segments == 1) {
    return _mm512_permutexvar_epi8(index, _mm512_loadu_si512(planes + q.base[0] + block.base[0]));
  }
  __m512i x = _mm512_setzero_si512();
  for (int32_t i = 0; i < block.segments; ++i) {
    for (int32_t j = 0; j < q.sources; ++j) {
      const __m512i from = _mm512_loadu_si512(planes + q.base[j] + block.base[i]);
      x = _mm512_mask_permutexvar_epi8(x, block.rows[i] & q.entries[j], index, from);
    }
  }
  return x;
}

// Finds the quads of units (sub-vectors, or groups of four entries) of `dim` entries, in `groups`
// quads of `size` entries each. Entries repeat their addresses, shifted by whole planes, after
// `period` units, so that most units reuse the quads of an earlier one.
class QuadFinder {
 public:
  QuadFinder(const Patch& p, int32_t depth, int32_t taps, int32_t dim, int32_t size, int32_t room)
      : p_(p), depth_(depth), taps_(taps), dim_(dim), size_(size), room_(room) {
    int32_t a = taps, b = dim;
    while (b) {
      const int32_t rest = a % b;
      a = b;
      b = rest;
    }
    groups_ = ceil_div(dim, size);
    period_ = taps / a;
    keep_ = period_ * groups_ <= kKept;
    step_ = dim / a * p.plane;
  }

  // Units must come in ascending order, without gaps.
  void next(int32_t unit, const uint8_t*& planes, const Quad*& quads) {
    const bool whole = (unit + 1) * dim_ <= depth_;
    if (!keep_ || !whole) {
      find(unit, kept_);
      planes = p_.planes;
      quads = kept_;
      return;
    }
    if (slot_ == period_) {
      slot_ = 0;
      shift_ += step_;
    }
    Quad* const q = kept_ + slot_++ * groups_;
    if (shift_ == 0) find(unit, q);
    planes = p_.planes + shift_;
    quads = q;
  }

 private:
  static constexpr int32_t kKept = 64;

  void find(int32_t unit, Quad* q) {
    for (int32_t g = 0; g < groups_; ++g) {
      const int32_t inside = dim_ - g * size_;
      int32_t first = unit * dim_ + g * size_;
      int32_t count = inside < size_ ? inside : size_;
      if (first + count > depth_) count = depth_ - first;
      if (count <= 0) first = 0, count = 1;  // any value will do: its weight is zero
      find_quad(p_, taps_, first, count, room_, q[g]);
    }
  }

  const Patch& p_;
  int32_t depth_, taps_, dim_, size_, room_, groups_, period_;
  bool keep_;
  int32_t slot_ = 0;
  int64_t step_, shift_ = 0;
  Quad kept_[kKept];
};

}  // namespace
}  // namespace lutra
