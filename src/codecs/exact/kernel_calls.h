// The GPU kernels of exact blocks (metal.h): which text, which grid.
#pragma once

#include "src/backends/metal/kernel.h"

namespace veloxquant::exact {

struct BlockKernelShape {
  int batch = 1, heads = 1, n_tokens = 0, dim = 0;
  bool bfloat = false;

  int n_blocks() const { return (n_tokens + 63) / 64; }
  int64_t block_bytes() const { return int64_t{128} * dim; }
};

// inputs: x [batch, heads, n_tokens, dim]. outputs: u8 [batch, heads, n_blocks, block bytes].
metal::Call encode_blocks_call(const BlockKernelShape& shape);
// inputs: blocks. outputs: fp32 [batch, heads, 64 n_blocks, dim].
metal::Call decode_blocks_call(const BlockKernelShape& shape);

}  // namespace veloxquant::exact
