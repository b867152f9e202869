// The GPU kernels of functions that belong to no single cache codec: words, Hamming scores.
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

}  // namespace veloxquant::metal
