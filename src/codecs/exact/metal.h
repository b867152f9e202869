// Exact blocks on Metal: 64 tokens of a KV head as 16 bits an element, and back.
#pragma once

#include "src/codecs/metal_rows.h"

namespace veloxquant {

// x [n_tokens][DIM] of a plane, any float -> blocks [64][DIM] of T, as bytes; absent tokens are
// zeros. thread: (element of a block, block, plane).
template <int DIM, class T, class X, class Bytes>
VQ_FN void exact_encode_blocks(X x, int n_tokens, int n_blocks, Bytes blocks, uint3 at) {
  const int64_t plane = at.z, token = 64 * (int64_t)at.y + at.x / DIM;
  ushort bits = 0;
  if (token < n_tokens) {
    const float value = (float)x[(plane * n_tokens + token) * DIM + at.x % DIM];
    bits = as_type<ushort>(FiniteNarrow<T>::of(value));
  }
  Bytes to = blocks + 2 * ((plane * n_blocks + at.y) * 64 * DIM + at.x);
  to[0] = (uint8_t)bits;
  to[1] = (uint8_t)(bits >> 8);
}

// blocks (as 32-bit words) -> y [n_blocks * 64][DIM], likewise.
template <int DIM, int BFLOAT, class Words, class Out>
VQ_FN void exact_decode_blocks(Words blocks, int n_blocks, Out out, uint3 at) {
  const int64_t block = at.z * (int64_t)n_blocks + at.y;
  Words words = blocks + block * 32 * DIM;
  const uint32_t bits = (words[at.x / 2] >> (16 * (at.x % 2))) & 0xffffu;
  out[block * 64 * DIM + at.x] = BFLOAT ? float_of(bits << 16) : f16_to_f32((uint16_t)bits);
}

}  // namespace veloxquant
