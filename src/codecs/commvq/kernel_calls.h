// The GPU kernels of CommVQ (metal.h): which text, which grid. RoPE is undone and redone around
// them by those of src/codecs/rope. What they compute is that of veloxquant/commvq.h, bit for bit.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "src/backends/metal/kernel.h"
#include "veloxquant/tensor_view.h"

namespace veloxquant::commvq {

struct BlockKernelShape {
  int batch = 1, heads = 1, n_tokens = 0, dim = 0;
  int n_stages = 1, n_entries = 2;

  int n_blocks() const { return (n_tokens + 63) / 64; }
  int64_t block_bytes() const { return int64_t{96} * n_stages + 128; }
};
// The inputs `norms` and `cross`, fp32 [heads, stages, 64] and [heads, stages, 64, 64], of a
// codebook fp16 [heads, stages, entries, 2, pairs].
struct StageProducts {
  std::vector<float> norms, cross;
};
StageProducts stage_products(const TensorView& codebook);

// inputs: z fp32 [batch, heads, n_tokens, dim] in planes, weighted; codebook, norms, cross.
// outputs: u8 [batch, heads, n_blocks, block bytes].
metal::Call encode_blocks_call(const BlockKernelShape& shape);
// inputs: blocks, codebook. outputs: z fp32 [batch, heads, 64 n_blocks, dim].
metal::Call decode_blocks_call(const BlockKernelShape& shape);

// comm_vq_decode. inputs: indices int32 [n, stages, n_books], codebook [stages, n_books, entries,
// sub_dim] of `type`, cosines, sines fp32 [n, n_books sub_dim / 2]. outputs: [n, n_books sub_dim].
metal::Call look_up_call(int n, int n_books, int sub_dim, metal::Type type);

}  // namespace veloxquant::commvq
