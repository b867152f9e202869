// CommVQ's published function as a lazy operation.
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

namespace veloxquant {

// indices: integers [..., n_cb] with codebook floats [n_cb, cb_size, sub_dim], or [..., R, n_cb]
// with [R, n_cb, cb_size, sub_dim]: R stages that add up. positions: integers, broadcast to the
// leading axes. inv_freq: [n_cb * sub_dim / 2]. -> [..., n_cb * sub_dim] in the dtype of the
// codebook.
mlx::core::array comm_vq_decode_op(const mlx::core::array& indices,
                                   const mlx::core::array& codebook,
                                   const mlx::core::array& positions,
                                   const mlx::core::array& inv_freq, int n_cb, int sub_dim,
                                   int cb_size, mlx::core::StreamOrDevice s = {});

}  // namespace veloxquant
