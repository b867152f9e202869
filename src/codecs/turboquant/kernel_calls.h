// The GPU kernels of the scalar codecs (metal.h, metal_blocks.h): which text, which grid, and the
// numbers they are given. What they compute is that of turboquant.h and scalar_quant.h, bit for
// bit.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "src/backends/metal/kernel.h"
#include "veloxquant/codec_spec.h"
#include "veloxquant/scalar_quant.h"

namespace veloxquant::turboquant {

// The input `quantizers`, fp32 [stages, 16]: Lloyd-Max tables of a dimension.
std::vector<float> quantizer_numbers(int dim, int bits, int stages);
// Levels by code, fp32 [stages, 16]: what attention's kernels look up.
std::vector<float> level_numbers(int dim, int bits, int stages);
// Queries of the `prod` form are q times this matrix, fp32 [dim, 2 dim]: R q, then S R q.
std::vector<float> sketched_queries(int dim, uint64_t seed);
// The input `signs`, fp32 [2, dim], of a codec's seed.
std::vector<float> rotation_signs(int dim, uint64_t seed);

// Rows of scalar_quant.h: n of them.
struct RowShape {
  int n = 0, dim = 0, bits = 1;
  ScalarScale scale = ScalarScale::norm_corrected;
  bool rotate = false;
};
constexpr int kMaxKernelDim = 1024;
std::optional<std::string> no_kernel_because(const RowShape& shape);
std::string row_limits();  // of such shapes, in words

// inputs: x [n, dim], signs (one number without rotation), quantizers. outputs: words uint32
// [n, words_per_row], scalars fp16 [n].
metal::Call quantize_call(const RowShape& shape);
// inputs: words, scalars, signs, quantizers. outputs: [n, dim] of `type`.
metal::Call dequantize_call(const RowShape& shape, metal::Type type);

// The published forms, nearest of given centroids. inputs: x of n values, centroids fp32
// [n_centroids]. outputs: codes u8 [n].
metal::Call nearest_call(int n, int n_centroids);
// inputs: x [rows, dim], diag fp32 [dim], centroids. outputs: codes u8 [rows, dim]. dim: a power of
// two.
metal::Call hadamard_nearest_call(int rows, int dim, int n_centroids);
// inputs: codes u8 [n], centroids. outputs: fp16 [n].
metal::Call centroids_call(int n, int n_centroids);

// Packed blocks (format.h).
struct BlockKernelShape {
  int batch = 1, heads = 1, n_tokens = 0, dim = 0;
  int stages = 1, bits = 1;  // of a stage; of `prod` without its sign: 0 to 3
  ScalarScale scale = ScalarScale::norm_corrected;
  bool prod = false, by_token = false;  // by_token: values

  int n_blocks() const { return (n_tokens + 63) / 64; }
  int64_t block_bytes() const {
    return int64_t{8} * dim * (stages * bits + (prod ? 1 : 0)) + (prod ? 256 : 128);
  }
};
// Of turboquant or turboquant_rvq, for one sequence without tokens.
BlockKernelShape block_shape_of(const CodecSpec& spec);
std::optional<std::string> no_kernel_because(const BlockKernelShape& shape);

// inputs: x [batch, heads, n_tokens, dim]; signs; quantizers; columns: S transposed of `prod`, fp32
// [dim, dim], else one number. outputs: u8 [batch, heads, n_blocks, block bytes].
metal::Call encode_blocks_call(const BlockKernelShape& shape);
// inputs: blocks, quantizers, sketch: S or one number. outputs: fp32 [batch, heads, 64 n_blocks,
// dim] in the codec's coordinates; tokens beyond n_tokens are whatever their codes say.
metal::Call decode_blocks_call(const BlockKernelShape& shape);

}  // namespace veloxquant::turboquant
