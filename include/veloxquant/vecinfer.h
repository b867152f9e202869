// VecInfer (arXiv 2510.06175): smooth, rotate, product vector quantisation.
#pragma once

#include "veloxquant/codec.h"

namespace veloxquant {

enum class TransformKind : uint8_t { none = 0, hadamard = 1, dense = 2 };

// A linear map per KV head. Sizes: H = n_kv_heads, D = head_dim.
//   none      y = x
//   hadamard  y = (x * (1/lambda)) Had       q' = (q * lambda) Had      x = (y Had) * lambda
//   dense     y = x E                        q' = q F                   x = y F^T   (F = E^-T)
// Had is the orthonormal block Walsh-Hadamard matrix of src/math/hadamard.h.
struct Transform {
  TransformKind kind = TransformKind::none;
  TensorView scale;          // lambda, fp32 [H, D]; empty means 1. hadamard only
  TensorView encode_matrix;  // E, fp32 [H, D, D], row-major. dense only
  TensorView query_matrix;   // F, fp32 [H, D, D], row-major. dense only
};

// tables: fp16 [S, H, M or 1, C, d] or [H, M or 1, C, d]: S sequences (1 = shared by all),
// H KV heads, M sub-vectors (1 = one table for all sub-vectors of a head), C centroids
// (2..4096; codes take 4, 6, 8, 10 or 12 bits, the least that C allows), d = head_dim /
// n_subvectors. Views must stay alive and unchanged as long as the codec. Throws Error on any mismatch.
CodecPtr make_vecinfer_codec(Side side, int n_kv_heads, int head_dim, int n_subvectors,
                             const TensorView& tables, const Transform& transform);

// Index of the nearest centroid by direct squared distance in fp32, ascending dimensions, no
// fused multiply-add; the lowest index wins ties. Equal on every backend and SIMD level.
// x: [d][n] (dimension-major), table: fp32 [C][d], codes: [n], distance: [n] or null.
void nearest_centroids(Backend backend, const float* x, int64_t x_stride, int64_t n,
                       const float* table, int n_centroids, int sub_dim, uint16_t* codes,
                       float* distance);

}  // namespace veloxquant
