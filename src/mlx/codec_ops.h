// A codec's blocks as operations of their own, without a cache: on the CPU or by the GPU kernels.
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

#include "src/mlx/codec_arrays.h"

namespace veloxquant {

// x [B, H, n, D], rounded to fp32 -> u8 [B, H, ceil(n / 64), block bytes]; the first token is at
// `position`.
mlx::core::array encode_blocks_op(const SharedCodec& codec, const mlx::core::array& x,
                                  int64_t position, mlx::core::StreamOrDevice s);
// And back: fp32 [B, H, 64 n_blocks, D] in the codec's coordinates.
mlx::core::array decode_blocks_op(const SharedCodec& codec, const mlx::core::array& blocks,
                                  int64_t position, mlx::core::StreamOrDevice s);

}  // namespace veloxquant
