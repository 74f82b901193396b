#include "packing.h"

#include <cstring>

namespace lutra {

size_t grouped_centroid_bytes(const PqShape& s) {
  return static_cast<size_t>(s.books) * book_words(s) * sizeof(int32_t);
}

void pack_grouped_centroids(const PqShape& s, const uint8_t* centroids, uint8_t* packed) {
  const int32_t groups = value_groups(s);
  std::memset(packed, 0, grouped_centroid_bytes(s));
  for (int32_t b = 0; b < s.books; ++b) {
    uint8_t* book = packed + b * book_words(s) * sizeof(int32_t);
    int32_t* norms = reinterpret_cast<int32_t*>(book) + static_cast<size_t>(s.centroids) * groups;
    for (int32_t k = 0; k < s.centroids; ++k) {
      const uint8_t* c = centroids + (static_cast<size_t>(b) * s.centroids + k) * s.dim;
      std::memcpy(book + static_cast<size_t>(k) * groups * 4, c, s.dim);
      int32_t norm = 0;
      for (int32_t v = 0; v < s.dim; ++v) norm += int32_t{c[v]} * c[v];
      const int32_t offset = -(norm >> 1);
      norms[k] = offset;
      norms[s.centroids + k] = offset * (1 << kKeyBits) + ((1 << kKeyBits) - 1 - k);
    }
  }
}

}  // namespace lutra
