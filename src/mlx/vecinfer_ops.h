// VecInfer's published functions as lazy operations: include/veloxquant/vecinfer_functions.h.
//
// x: any floats [..., D], any leading axes, none included. codebook: [C, d], one per sub-vector
// [M, C, d], or one per head and sub-vector [H, M or 1, C, d] with x [..., H, S, D].
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

#include <optional>
#include <utility>

namespace veloxquant {

// -> int32 [..., M]. float16 rows are compared with the codebook rounded to float16.
mlx::core::array vecinfer_quantize_op(const mlx::core::array& x, const mlx::core::array& codebook,
                                      int sub_dim, mlx::core::StreamOrDevice s = {});

// indices: integers [..., M] -> [..., M * d] in out_dtype (default: that of the codebook).
mlx::core::array vecinfer_dequant_op(const mlx::core::array& indices,
                                     const mlx::core::array& codebook,
                                     std::optional<mlx::core::Dtype> out_dtype,
                                     mlx::core::StreamOrDevice s = {});

// x: [B, H, S, D] -> (x^ float16 [B, H, S, D], codes [B, H, S, M] in code_dtype). smooth: [D] or
// [R, D], per head where R = H, else its mean over R. name: the caller's, for error texts.
std::pair<mlx::core::array, mlx::core::array> vecinfer_encode_decode_op(
    const char* name, const mlx::core::array& x, const mlx::core::array& codebook, int sub_dim,
    const std::optional<mlx::core::array>& matrix, const std::optional<mlx::core::array>& smooth,
    mlx::core::Dtype code_dtype, mlx::core::StreamOrDevice s = {});

// -> [..., M, C] in the dtype of q.
mlx::core::array vecinfer_query_lut_op(const mlx::core::array& q, const mlx::core::array& codebook,
                                       int sub_dim, mlx::core::StreamOrDevice s = {});

}  // namespace veloxquant
