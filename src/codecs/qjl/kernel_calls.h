// The GPU kernels of QJL's packed blocks and functions (metal_blocks.h, metal.h): which text, which
// grid. What they compute is that of veloxquant/qjl.h, bit for bit.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "src/backends/metal/kernel.h"
#include "src/codecs/qjl/format.h"
#include "veloxquant/codec_spec.h"

namespace veloxquant::qjl {

constexpr int kMaxKernelDim = 1024;  // of the functions' rows

struct BlockKernelShape {
  int batch = 1, heads = 1, n_tokens = 0, dim = 0;
  BlockLayout layout;  // its channels: those that a block names
  int outliers = 0;
  bool dense = false;  // a matrix instead of rotations

  int n_blocks() const { return (n_tokens + kBlockTokens - 1) / kBlockTokens; }
  bool sketched() const { return !dense && outliers == 0 && layout.m == dim; }
};
// Of a codec, for one sequence without tokens. given_rows: of its `sketch`, 0 without one.
BlockKernelShape block_shape_of(const CodecSpec& spec, int given_rows, bool has_channels);
// The input `sketch` of stacked rotations, fp32 [(m + m_out) / dim, 2, dim]: their signs.
std::vector<float> sketch_signs(const BlockKernelShape& shape, uint64_t seed);
// The input `constants`, fp32 [2].
std::vector<float> score_constants(const BlockKernelShape& shape);

// What attention has queries times: fp32 [dim, m], the sketch's rows; with outliers [dim, m + dim],
// behind them the query itself. sketch: the given one, or null.
std::vector<float> query_matrix(const BlockKernelShape& shape, const float* sketch, uint64_t seed);
// The numbers of OutlierTile. channels: fixed ones, [heads][outliers], or empty.
std::vector<float> outlier_numbers(const BlockKernelShape& shape, const float* sketch,
                                   uint64_t seed, const std::vector<int32_t>& channels);

std::optional<std::string> no_kernel_because(const BlockKernelShape& shape);
// inputs: x [batch, heads, n_tokens, dim]; sketch: signs, or fp32 [m, dim]; channels int32 [heads,
// outliers], ascending, or one number. outputs: u8 [batch, heads, n_blocks, block bytes].
metal::Call encode_blocks_call(const BlockKernelShape& shape);
// inputs: blocks, sketch, channels, constants. outputs: fp32 [batch, heads, 64 n_blocks, dim].
metal::Call decode_blocks_call(const BlockKernelShape& shape);

std::optional<std::string> no_rows_kernel_because(int dim);  // of the functions
std::string row_limits();                                    // in words
// qjl_encode. inputs: x fp32 [n, dim], sketch fp32 [m, dim]. outputs: signs u8 [n, m / 8], norms
// fp16 [n].
metal::Call encode_rows_call(int n, int dim, int m);
// qjl_inner_product. inputs: q fp32 [batches, q_heads, m], signs u8 [batches, n, heads, m / 8],
// norms fp32 [batches, n, heads], constant fp32 [1] (score_constant). outputs: fp16 [batches,
// q_heads, n].
metal::Call inner_product_call(int batches, int q_heads, int heads, int n);
float score_constant(int m);

}  // namespace veloxquant::qjl
