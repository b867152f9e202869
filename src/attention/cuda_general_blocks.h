// The encode launch that encode_blocks and append_token share.
#pragma once

#include "src/attention/cuda_general.h"

namespace veloxquant::cuda {

// seal: lengths as advance_lengths() leaves them; then only sequences that sealed a block in this
// step are encoded, behind their packed tokens.
void launch_encode(const BlockSide& side, const BlockTable& table, int batch, const ExactSide& x,
                   DType dtype, int n_tokens, int first_block, const int32_t* seal, Stream stream,
                   bool only_compile);

}  // namespace veloxquant::cuda
