// VecInfer's codes in the fragment order of CUDA's tensor-core kernels (cuda_layout.h): what those
// kernels do not cover runs on the same codes.
#pragma once

#include "src/codecs/vecinfer/cuda_layout.h"

namespace veloxquant {

// Codes of tokens 4 w .. 4 w + 3 of a block for one sub-vector, one in each byte. CHUNKS: of 8
// sub-vectors, padding included.
template <int VALUES, int CHUNKS, class Words>
VQ_FN uint32_t fragment_codes(Words words, int m, uint w) {
  Words step = words + (int)(w / 8u) * (64 * CHUNKS);
  const int token = 4 * (int)(w % 8u);
  if (VALUES) return step[vecinfer::value_offset(CHUNKS, token, m) / 4];
  const int first = vecinfer::key_offset(CHUNKS, token, m);
  const int other = vecinfer::key_offset(CHUNKS, token + 2, m);
  return ((step[first / 4] >> (8 * (first % 4))) & 0xffffu) |
         (((step[other / 4] >> (8 * (other % 4))) & 0xffffu) << 16);
}

}  // namespace veloxquant
