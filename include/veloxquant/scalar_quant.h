// Scalar quantisation of rows, outside of any cache: packed words and one scalar a row; and the
// published forms, one byte a code with the caller's centroids.
#pragma once

#include <cstdint>

#include "veloxquant/tensor_view.h"
#include "veloxquant/turboquant.h"

namespace veloxquant {

struct ScalarQuantParams {
  int dim = 0;   // of a row, at least 1
  int bits = 1;  // 1..4
  ScalarScale scale = ScalarScale::norm_corrected;
  bool rotate = false;  // by the rotation of the caches, of `seed`
  uint64_t seed = 0;
};

// x: n rows of float32, float16 or bfloat16; NaN counts as 0, infinities as the largest fp16.
// words: [n][words_per_row(dim, bits)] (words.h), scalars: fp16 [n].
// Codes and scalars are those of make_turboquant_codec, bit for bit.
void scalar_quantize(Backend backend, const ScalarQuantParams& params, DType dtype, const void* x,
                     int64_t n, uint32_t* words, uint16_t* scalars);
void scalar_dequantize(Backend backend, const ScalarQuantParams& params, const uint32_t* words,
                       const uint16_t* scalars, int64_t n, DType dtype, void* x);

// codes[i] = the centroid nearest to x[i]; the lowest index wins ties, NaN gets 0.
// n_centroids: 1..256.
void nearest_scalar(Backend backend, DType dtype, const void* x, int64_t n, const float* centroids,
                    int n_centroids, uint8_t* codes);
// The same of H (diag * row) / sqrt(dim); dim a power of two.
void nearest_scalar_of_hadamard(Backend backend, DType dtype, const void* x, int64_t n_rows,
                                int dim, const float* diag, const float* centroids, int n_centroids,
                                uint8_t* codes);
// fp16 centroids of codes; codes beyond the table read its last entry.
void scalar_centroids(const uint8_t* codes, int64_t n, const float* centroids, int n_centroids,
                      uint16_t* values);

}  // namespace veloxquant
