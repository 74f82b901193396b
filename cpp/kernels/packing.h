// Packing shared by the instruction sets that work on four values per 32-bit lane. Plain code: it
// is compiled for the baseline CPU, so no instruction set's file needs a copy of it.
#pragma once

#include "kernels.h"

namespace lutra {

inline constexpr int32_t kKeyBits = 6;  // a search key is score * 64 + (63 - k): max finds lowest k

// One codebook, as int32 words: K x groups (4 centroid values each), then K x -(norm >> 1), then
// K x the same in key form. groups = ceil(V / 4); missing values are zero.
inline int32_t value_groups(const PqShape& s) { return (s.dim + 3) / 4; }
inline size_t book_words(const PqShape& s) {
  return static_cast<size_t>(s.centroids) * (value_groups(s) + 2);
}
size_t grouped_centroid_bytes(const PqShape& s);
void pack_grouped_centroids(const PqShape& s, const uint8_t* centroids, uint8_t* packed);

// 16-entry slices of a table: code = 16 * slice + entry.
inline int32_t table_slices(const PqShape& s) { return (s.centroids + 15) / 16; }

}  // namespace lutra
