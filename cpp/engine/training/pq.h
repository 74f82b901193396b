// What training needs beside the forward pass of a product-quantised layer.
#pragma once

#include "engine/layers/patch_source.h"

namespace lutra {

// Gradient of the tables: grad (codebooks, K, M) = scatter-add of the output gradient by code.
//   codes (codebooks, rows); gradient: view of shape (n, M, h, w) with rows in (n, h, w) order.
// The work is split over codebooks, so the result does not depend on the number of threads.
void table_gradient(const Kernels& kernels, const PqShape& shape, const uint8_t* codes,
                    const ImageView& gradient, float* grad, ThreadPool& pool);

// Sums and counts of the quantised sub-vectors by code: sums (codebooks, K, V) of x_q, counts
// (codebooks, K).
void cluster_sums(const Kernels& kernels, const PqShape& shape, const ConvGeometry& geometry,
                  const Quantization& quantization, const ImageView& input, const uint8_t* codes,
                  int64_t* sums, int64_t* counts, ThreadPool& pool);

// How often two codes meet in a row: counts (codebooks * K, codebooks * K), symmetric.
//   codes (codebooks, rows), each below K <= 64.
void code_pairs(const uint8_t* codes, int64_t codebooks, int64_t rows, int64_t centroids,
                int32_t* counts, ThreadPool& pool);

}  // namespace lutra
