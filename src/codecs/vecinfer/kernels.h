// What a backend implements for VecInfer. `reference` is the executable specification, `cpu` the
// Highway kernels; both give the same bits.
#pragma once

#include "src/codecs/vecinfer/format.h"
#include "veloxquant/vecinfer.h"

namespace veloxquant::vecinfer {

// y_t: codec coordinates, fp32 [head_dim][64] (dimension-major), all 64 columns valid.
// Writes every byte of the block.
using EncodeBlock = void (*)(const HeadTables& head, const float* y_t, uint8_t* block);

// y: fp32 [n_tokens][y_stride]
using DecodeBlock = void (*)(const HeadTables& head, const uint8_t* block, int n_tokens, float* y,
                             int64_t y_stride);

// y_t: fp32 [head_dim][64]; columns from n_tokens on are zero.
using DecodeBlockTransposed = void (*)(const HeadTables& head, const uint8_t* block, int n_tokens,
                                       float* y_t);

// In place on x_t: fp32 [head_dim][64], dimension-major. `inverse_scale` (1/lambda) may be null.
using HadamardTile = void (*)(const float* inverse_scale, int head_dim, float* x_t);

// y_t[j][t] = sum_i x_t[i][t] * matrix[i][j], ascending i.
using DenseTile = void (*)(const float* matrix, int head_dim, const float* x_t, float* y_t);

// y[r] = x[r] * matrix, or x[r] * matrix^T, for n rows of head_dim floats that do not overlap;
// every sum in ascending order of what it runs over.
using DenseRows = void (*)(const float* matrix, int head_dim, bool transposed, const float* x,
                           int64_t n, float* y);

using NearestCentroids = void (*)(const float* x, int64_t x_stride, int64_t n, const float* table,
                                  int n_centroids, int sub_dim, uint16_t* codes, float* distance);

// out[c] = sum_i q[i] * columns[i][c], ascending i. columns: fp32 [d][C].
using QueryLut = void (*)(const float* q, const float* columns, int n_centroids, int sub_dim,
                          float* out);

struct Kernels {
  EncodeBlock encode_block;
  DecodeBlock decode_block;
  DecodeBlockTransposed decode_block_transposed;
  HadamardTile hadamard_tile;
  DenseTile dense_tile;
  DenseRows dense_rows;
  NearestCentroids nearest_centroids;
  QueryLut query_lut;
};

const Kernels& reference_kernels();
const Kernels& cpu_kernels();
inline const Kernels& kernels_of(Backend backend) {
  return backend == Backend::reference ? reference_kernels() : cpu_kernels();
}

}  // namespace veloxquant::vecinfer
