// The scalar family's functions as lazy operations: scalar_quant.h, words.h, rvq_attend.h.
// x: any floats, any leading axes, none included, empty ones too.
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

#include <optional>
#include <utility>

#include "veloxquant/scalar_quant.h"

namespace veloxquant {

// x: [..., D] -> (uint32 words [..., W], fp16 scalars [...]). name: the caller's, for errors.
std::pair<mlx::core::array, mlx::core::array> scalar_quantize_op(const char* name,
                                                                 const mlx::core::array& x,
                                                                 ScalarQuantParams params,
                                                                 mlx::core::StreamOrDevice s = {});
// -> [..., dim] in dtype.
mlx::core::array scalar_dequantize_op(const mlx::core::array& words,
                                      const mlx::core::array& scalars,
                                      const ScalarQuantParams& params, mlx::core::Dtype dtype,
                                      mlx::core::StreamOrDevice s = {});

// The published forms. centroids: 2^bits floats of any shape. -> uint8, the shape of x.
mlx::core::array nearest_scalar_op(const mlx::core::array& x, const mlx::core::array& centroids,
                                   int bits, mlx::core::StreamOrDevice s = {});
// x: [B, D], diag: [D], D a power of two up to 1024.
mlx::core::array hadamard_nearest_op(const mlx::core::array& x, const mlx::core::array& diag,
                                     const mlx::core::array& centroids, int bits,
                                     mlx::core::StreamOrDevice s = {});
// -> fp16 centroids, the shape of indices; codes beyond the table read its last entry.
mlx::core::array scalar_centroids_op(const mlx::core::array& indices,
                                     const mlx::core::array& centroids,
                                     mlx::core::StreamOrDevice s = {});

// indices: integers or bools [..., n], each masked to `bits` bits -> uint32 [..., W].
mlx::core::array pack_words_op(const mlx::core::array& indices, int bits,
                               mlx::core::StreamOrDevice s = {});
// packed: uint32 [..., W] -> int32 [..., n].
mlx::core::array unpack_words_op(const mlx::core::array& packed, int bits, int64_t n,
                                 mlx::core::StreamOrDevice s = {});
// The published forms over bytes: bits 1, 2 or 4, flat.
mlx::core::array pack_bytes_op(const mlx::core::array& indices, int bits,
                               mlx::core::StreamOrDevice s = {});
mlx::core::array unpack_bytes_op(const mlx::core::array& packed, int64_t n, int bits,
                                 mlx::core::StreamOrDevice s = {});

struct RvqAttendOptions {
  int b1 = 1, b2 = 1, bv = 1;
  std::optional<float> scale;  // default 1 / sqrt(D)
  bool causal = false;
  int64_t sliding_window = 0;
  std::optional<mlx::core::array> key_norms;  // [B, H_kv, S]
  std::optional<mlx::core::array> mask;       // bool or float, broadcastable to [B, H, S_q, S]
};

// See rvq_attend.h. Codes: integers, one each, or uint32 words of b1 and b2 bits where the last
// axis is words_per_row(D, bits). -> fp16 [B, H, S_q, D_v].
mlx::core::array rvq_attend_op(const mlx::core::array& q, const mlx::core::array& keys1,
                               const mlx::core::array& keys2, const mlx::core::array& centroids1,
                               const mlx::core::array& centroids2, const mlx::core::array& values,
                               const mlx::core::array& value_table, const RvqAttendOptions& options,
                               mlx::core::StreamOrDevice s = {});

}  // namespace veloxquant
