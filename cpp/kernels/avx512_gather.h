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
  int64_t at[4];   // the entries themselves
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
  int64_t* const at = q.at;
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

// --- 64 rows of one entry -------------------------------------------------------------------

// How the rows of a whole tile lie: consecutive, within 64, 80 or 128 bytes, or farther apart.
enum class Reach { kPlain, kSingle, kPair, kWidePair, kSegments };

// One byte for each row. Where the rows are not consecutive, the index of the permute also brings
// them into the order in which the unpacks of `interleave` deliver them.
struct ByteRows {
  Reach reach;
  __m512i index;
  int32_t segments;  // as in RowBlock, but of up to 64 rows; the rest by find_segments()
  int32_t base[64];
  __mmask64 rows[64];
};

void find_byte_rows(const Patch& p, ByteRows& rows) {
  const int32_t span = p.row[kRows - 1] - p.row[0];
  rows.base[0] = p.row[0];
  rows.reach = p.consecutive ? Reach::kPlain
               : span < 64   ? Reach::kSingle
               : span < 80   ? Reach::kPair
               : span < 128  ? Reach::kWidePair
                             : Reach::kSegments;
  const __m512i base = _mm512_set1_epi32(p.row[0]);
  __m512i r[4];
#pragma GCC unroll 4
  for (int32_t i = 0; i < 4; ++i) {
    r[i] = _mm512_sub_epi32(_mm512_loadu_si512(p.row + 16 * i), base);
  }
  // Packs work inside lanes, as unpacks do: the order is the one wanted.
  rows.index = _mm512_packus_epi16(_mm512_packs_epi32(r[0], r[1]), _mm512_packs_epi32(r[2], r[3]));
}

void find_segments(const Patch& p, ByteRows& rows) {
  alignas(64) uint8_t index[64];
  rows.segments = 0;
  for (int32_t r = 0; r < kRows; ++r) {
    if (r == 0 || p.row[r] - rows.base[rows.segments - 1] >= 64) {
      rows.rows[rows.segments] = 0;
      rows.base[rows.segments++] = p.row[r];
    }
    const int32_t at = (r & 12) * 4 + (r >> 4) * 4 + (r & 3);
    index[at] = static_cast<uint8_t>(p.row[r] - rows.base[rows.segments - 1]);
    rows.rows[rows.segments - 1] |= 1ull << at;
  }
  rows.index = _mm512_load_si512(index);
}

template <Reach kReach>
__m512i load_rows(const uint8_t* at, const ByteRows& rows) {
  const __m512i lower = _mm512_loadu_si512(at + rows.base[0]);
  if constexpr (kReach == Reach::kPlain) {
    return lower;
  } else if constexpr (kReach == Reach::kSingle) {
    return _mm512_permutexvar_epi8(rows.index, lower);
  } else if constexpr (kReach == Reach::kPair) {
    const __m128i* const rest = reinterpret_cast<const __m128i*>(at + rows.base[0] + 64);
    return _mm512_permutex2var_epi8(lower, rows.index,
                                    _mm512_castsi128_si512(_mm_loadu_si128(rest)));
  } else if constexpr (kReach == Reach::kWidePair) {
    const __m512i upper = _mm512_loadu_si512(at + rows.base[0] + 64);
    return _mm512_permutex2var_epi8(lower, rows.index, upper);
  } else {
    __m512i x = _mm512_maskz_permutexvar_epi8(rows.rows[0], rows.index, lower);
    for (int32_t i = 1; i < rows.segments; ++i) {
      const __m512i from = _mm512_loadu_si512(at + rows.base[i]);
      x = _mm512_mask_permutexvar_epi8(x, rows.rows[i], rows.index, from);
    }
    return x;
  }
}

// Four registers of one byte per row -> blocks of 16 rows x 4 bytes. The unpacks work inside lanes:
// row 16 q + 4 j + i must be byte 16 j + 4 q + i.
void interleave(const __m512i* p, __m512i* quads) {
  const __m512i lo01 = _mm512_unpacklo_epi8(p[0], p[1]), hi01 = _mm512_unpackhi_epi8(p[0], p[1]);
  const __m512i lo23 = _mm512_unpacklo_epi8(p[2], p[3]), hi23 = _mm512_unpackhi_epi8(p[2], p[3]);
  quads[0] = _mm512_unpacklo_epi16(lo01, lo23);
  quads[1] = _mm512_unpackhi_epi16(lo01, lo23);
  quads[2] = _mm512_unpacklo_epi16(hi01, hi23);
  quads[3] = _mm512_unpackhi_epi16(hi01, hi23);
}

// A quad of entries that lie apart, for all blocks at once: four loads instead of sixteen. Not for
// rows in segments.
void gather_wide(const uint8_t* planes, const Quad& q, const ByteRows& rows, __m512i* quads) {
  __m512i p[4];
#pragma GCC unroll 4
  for (int32_t t = 0; t < 4; ++t) {
    const uint8_t* const at = planes + q.at[t];
    switch (rows.reach) {
      case Reach::kPlain:
        p[t] = transpose_dwords(load_rows<Reach::kPlain>(at, rows));
        break;
      case Reach::kSingle:
        p[t] = load_rows<Reach::kSingle>(at, rows);
        break;
      case Reach::kPair:
        p[t] = load_rows<Reach::kPair>(at, rows);
        break;
      default:
        p[t] = load_rows<Reach::kWidePair>(at, rows);
    }
  }
  interleave(p, quads);
}

// One quad for all blocks, of which the last may be missing.
void gather_blocks(const uint8_t* planes, const Quad& quad, const Rows& rows, const ByteRows& bytes,
                   __m512i* quads) {
  if (rows.blocks > 1 && bytes.reach != Reach::kSegments && quad.sources > 1) {
    return gather_wide(planes, quad, bytes, quads);
  }
#pragma GCC unroll 4
  for (int32_t i = 0; i < 4; ++i) {
    if (i < rows.blocks) quads[i] = gather_quad(planes, quad, rows.block[i]);
  }
}

// --- the quads of a tile ----------------------------------------------------------------------

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

// to: [quad][block][64 bytes]
void gather_quads(const uint8_t* planes, const Quad* quads, int32_t groups, const Rows& rows,
                  const ByteRows& bytes, uint8_t* to) {
  for (int32_t g = 0; g < groups; ++g, to += 64 * rows.blocks) {
    __m512i x[4];
    gather_blocks(planes, quads[g], rows, bytes, x);
    for (int32_t i = 0; i < rows.blocks; ++i) _mm512_storeu_si512(to + 64 * i, x[i]);
  }
}

}  // namespace
}  // namespace lutra
