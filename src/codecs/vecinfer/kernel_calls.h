// The GPU kernels of VecInfer's functions (metal.h): which text, which grid. What they compute is
// that of veloxquant/vecinfer_functions.h, bit for bit.
#pragma once

#include <optional>
#include <string>

#include "src/backends/metal/kernel.h"

namespace veloxquant::vecinfer {

// x [planes, rows, dim], planes = batches * heads; codebooks fp32 [heads or 1, M or 1, C, sub_dim].
struct RowShape {
  int planes = 1, heads = 1, rows = 0, dim = 0;
  int sub_dim = 1, n_centroids = 1;
  int table_heads = 1, tables = 1;  // the leading axes of the codebook

  int n_subvectors() const { return dim / sub_dim; }
};

constexpr int kMaxKernelDim = 1024, kMaxKernelSubDim = 32;
constexpr int kMaxBlockKernelDim = 256;

// Why these kernels do not take the shape; nothing where they do.
std::optional<std::string> no_kernel_because(const RowShape& shape);
std::string row_limits();  // of such shapes, in words

// inputs: x, codebook. outputs: codes int32 [planes, rows, M].
metal::Call quantize_call(const RowShape& shape);
// inputs: codes (int32 or uint32), codebook. outputs: [planes, rows, dim] in the codebook's type.
metal::Call dequantize_call(const RowShape& shape, metal::Type type);
// inputs: q, codebook fp32. outputs: [planes, rows, M, C] in the type of q.
metal::Call query_lut_call(const RowShape& shape, metal::Type type);
// inputs: matrix fp32 [dim, dim]. outputs: uint32 [1].
metal::Call is_hadamard_call(int dim);
// inputs: x, codebook, matrix, its flag, lambda (arrays of one number where there is none).
// outputs: fp16 [planes, rows, dim], codes [planes, rows, M] of code_type (int32 or uint32).
metal::Call encode_decode_call(const RowShape& shape, bool has_matrix, int lambda_rows,
                               metal::Type code_type);

// Packed blocks (format.h) of a codec with tables fp16 [sequences, heads, M or 1, C, sub_dim].
struct BlockShape {
  int batch = 1, heads = 1, n_blocks = 0, dim = 0;
  int sub_dim = 1, n_centroids = 1, bits = 8, tables = 1;
  int transform = 0;  // 0 none, 1 Hadamard, 2 matrix

  int64_t block_bytes() const { return int64_t{dim} / sub_dim * 8 * bits; }
};
std::optional<std::string> no_kernel_because(const BlockShape& shape);
// inputs: x [batch, heads, n_tokens, dim], n_tokens in the last of n_blocks; tables; forward fp32:
// 1 / lambda [heads, dim], E [heads, dim, dim], or one number. outputs: u8 [batch, heads, n_blocks,
// block bytes].
metal::Call encode_blocks_call(const BlockShape& shape);
// inputs: blocks, tables. outputs: fp32 [batch, heads, 64 n_blocks, dim], codec coordinates.
metal::Call decode_blocks_call(const BlockShape& shape);

}  // namespace veloxquant::vecinfer
