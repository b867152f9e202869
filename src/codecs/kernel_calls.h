// The GPU kernels of functions that belong to no single cache codec: words, Hamming scores; the
// grids of packed blocks.
#pragma once

#include "src/backends/metal/kernel.h"

namespace veloxquant::metal {

// inputs: codes [rows, n] (int32 or uint8). outputs: uint32 [rows, words_per_row(n, bits)].
Call pack_words_call(int rows, int n_codes, int bits);
// inputs: uint32 [rows, row_words]. outputs: int32 [rows, n].
Call unpack_words_call(int rows, int n_codes, int bits);
// inputs: query u8 [bytes], codes u8 [n, bytes], offset fp32 [n], scale fp32 [1]. outputs: fp32
// [n].
Call hamming_score_call(int n, int n_dims);

// Decoded rows out of a codec's coordinates (metal_inverse.h). inputs: y fp32 [batch, heads, n,
// dim]; numbers fp32: factors [heads, dim], matrices [heads, dim, dim], signs [2, dim] or one.
// outputs: like y, of `out`.
Call inverse_rows_call(int batch, int heads, int n, int dim, int transform, Type out);

// Blocks of x [batch, heads, n, dim] to u8 [batch, heads, n_blocks, block_bytes], eight
// threadgroups of 256 threads each: (eighth, block, plane).
void set_encode_grid(Call& call, int batch, int heads, int n_blocks, int64_t block_bytes);
// And back, to fp32 [batch, heads, 64 n_blocks, dim], a thread an element.
void set_decode_grid(Call& call, int batch, int heads, int n_blocks, int dim);

}  // namespace veloxquant::metal
