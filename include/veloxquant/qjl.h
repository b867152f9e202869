// QJL (arXiv 2406.03482): the signs of a random sketch of a key, and its norm.
//
//   <q, k>  ~  sqrt(pi/2) / m * |k| * <S q, sign(S k)>        S: m x head_dim
#pragma once

#include <cstdint>

#include "veloxquant/codec.h"

namespace veloxquant {

struct QjlOptions {
  int sketch_bits = 0;  // m; a multiple of head_dim unless `sketch` is given, then its rows
  // Channels of the largest norms that get a sketch of their own (outlier_bits signs and a norm);
  // chosen for every block of 64 tokens, unless outlier_channels names them.
  int outliers = 0;
  int outlier_bits = 0;  // 0: head_dim; with `sketch` given: of its first rows
  uint64_t seed = 0;
  TensorView sketch;            // S, fp32 [m, head_dim], m a multiple of 8; empty: structured
  TensorView outlier_channels;  // int32 [n_kv_heads, outliers]
};

// Keys only. The structured sketch stacks m / head_dim orthogonal blocks (qjl_sketch).
CodecPtr make_qjl_codec(int n_kv_heads, int head_dim, const QjlOptions& options);

// The structured sketch as a matrix, fp32 [m][head_dim]: blocks sqrt(D) R_0, sqrt(D) R_1, ... of
// independent seeded rotations, so that rows are orthogonal in a block and as long as Gaussian
// ones.
void qjl_sketch(int head_dim, int m, uint64_t seed, float* sketch);

// signs: [n][m / 8], bit j % 8 of byte j / 8 is 1 where <S_j, x> >= 0; norms: fp16 [n], at most
// 65504. x: fp32 [n][dim]; NaN counts as 0, infinities as +-65504. sketch: fp32 [m][dim].
// Sums in ascending order: equal on every backend and SIMD level.
void qjl_encode(Backend backend, const float* x, int64_t n, int dim, const float* sketch, int m,
                uint8_t* signs, uint16_t* norms);

// scores[h][i] = sqrt(pi/2)/m * norm[i] * sum_j q[h][j] (2 bit_ij - 1); query head h reads the key
// head h / (n_query_heads / n_key_heads). Strides in elements (bytes of signs).
struct QjlScores {
  const float* queries = nullptr;  // S q, [n_query_heads][m]
  int n_query_heads = 0;
  int n_key_heads = 0;
  int m = 0;  // a multiple of 8
  const uint8_t* signs = nullptr;
  int64_t sign_key_stride = 0, sign_head_stride = 0;
  const float* norms = nullptr;
  int64_t norm_key_stride = 0, norm_head_stride = 0;
  int64_t n_keys = 0;
  float* scores = nullptr;  // [n_query_heads][n_keys]
};
void qjl_inner_product(const QjlScores& work);

}  // namespace veloxquant
