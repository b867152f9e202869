// The GPU kernels of RaBitQ's packed blocks, codes and scores (metal_blocks.h, metal.h): which
// text, which grid. What they compute is that of veloxquant/rabitq.h, bit for bit. The Hamming
// score is in src/codecs/kernel_calls.h.
#pragma once

#include <optional>
#include <string>

#include "src/backends/metal/kernel.h"
#include "veloxquant/codec_spec.h"
#include "veloxquant/rabitq.h"

namespace veloxquant::rabitq {

struct BlockKernelShape {
  int batch = 1, heads = 1, n_tokens = 0, dim = 0;
  int bits = 1;
  RabitqScale scale = RabitqScale::unbiased;
  bool mean = false;

  int n_blocks() const { return (n_tokens + 63) / 64; }
  int64_t block_bytes() const { return int64_t{8} * dim * bits + 128; }
};
// Of a codec, for one sequence without tokens.
BlockKernelShape block_shape_of(const CodecSpec& spec, bool has_mean);
std::optional<std::string> no_kernel_because(const BlockKernelShape& shape);

// inputs: x [batch, heads, n_tokens, dim]; signs fp32 [2, dim] of the rotation; mean fp32 [heads,
// dim], rotated, or one number. outputs: u8 [batch, heads, n_blocks, block bytes].
metal::Call encode_blocks_call(const BlockKernelShape& shape);
// inputs: blocks, mean. outputs: fp32 [batch, heads, 64 n_blocks, dim], codec coordinates.
metal::Call decode_blocks_call(const BlockKernelShape& shape);

// rabitq_encode. inputs: x [n, dim], signs. outputs: codes u8 [n, dim / 8], factors fp32 [n].
metal::Call encode_rows_call(int n, int dim);

// The popcount score in two launches. inputs: q fp32 [rows, dim], signs. outputs: planes u8 [rows,
// query_bits, dim / 8], numbers fp32 [rows, 4].
metal::Call popcount_queries_call(int rows, int dim, int query_bits);
// inputs: these two, codes u8 [rows / group, n, dim / 8], factors fp32 [rows / group, n]. outputs:
// fp32 [rows, n].
metal::Call popcount_scores_call(int rows, int group, int n, int dim);

}  // namespace veloxquant::rabitq
