// VecInfer on plain rows, without a cache: quantise, dequantise, both with a transform, and the
// look-up tables of a query. The codec (vecinfer.h) uses the same tables and gives the same codes.
//
// B batches, H heads, S rows, D = M * d dimensions, all views row-major. Codebooks: fp32
// [H or 1, M or 1, C, d]; an axis of 1 is shared. 1 <= C <= 65536, d <= 64. Throws Error where
// shapes do not fit. The rows are spread over the worker threads.
#pragma once

#include "veloxquant/backend.h"
#include "veloxquant/tensor_view.h"

namespace veloxquant {

// x: float32, float16 or bfloat16 [B, H, S, D] -> codes: int32 [B, H, S, M], by nearest_centroids.
void vecinfer_quantize(Backend backend, const TensorView& x, const TensorView& codebook,
                       const MutableTensorView& codes);

// codes: int32 [B, H, S, M]; one that is negative or at least C reads the last centroid.
// codebook, out [B, H, S, D]: any dtype, the same for both.
void vecinfer_dequantize(const TensorView& codes, const TensorView& codebook,
                         const MutableTensorView& out);

// u = x / lambda (x where lambda <= 1e-8), y = matrix u, codes of y, x^ = (matrix^T y^) * lambda.
// matrix: fp32 [D, D], empty: none; the Walsh-Hadamard matrix takes the butterfly of
// src/math/hadamard.h. lambda: fp32 [H or 1, D], empty: none. x: as above; x^: float16 [B, H, S,
// D], saturated; codes: int32 [B, H, S, M].
void vecinfer_encode_decode(Backend backend, const TensorView& x, const TensorView& codebook,
                            const TensorView& matrix, const TensorView& lambda,
                            const MutableTensorView& decoded, const MutableTensorView& codes);

// lut[m][c] = q_m . codebook[m][c], fp32 sums over ascending dimensions: a score is a sum of M
// entries. q: float32, float16 or bfloat16 [B, H, S, D]; lut: [B, H, S, M, C] in the dtype of q.
void vecinfer_query_lut(Backend backend, const TensorView& q, const TensorView& codebook,
                        const MutableTensorView& lut);

}  // namespace veloxquant
