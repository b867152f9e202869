// Packed blocks of the scalar codecs on Metal: 64 tokens of a KV head to the bytes of format.h, and
// back. A threadgroup takes eight neighbouring tokens, whose codes of one row fill whole bytes.
#pragma once

#include "src/codecs/turboquant/metal.h"

namespace veloxquant {

// Bytes of a plane of codes, and of the fp16 scalars of a block.
VQ_FN int scalar_plane_bytes(int dim, int bits) { return 8 * dim * bits; }
VQ_CONSTANT int kScalarsBytes = 128;

// x [n_tokens][DIM] of one plane -> blocks; absent tokens have code 0 and scalar 0. SKETCH: the
// `prod` form, BITS then without its sign. BY_TOKEN: values. group: (eighth, block, plane).
// codes: [STAGES + SKETCH][8][DIM], norms [8], scalars [16].
template <int DIM, int STAGES, int BITS, int SCALE, int SKETCH, int BY_TOKEN, class X, class Signs,
          class Quantizers, class Columns, class Bytes, class Rows, class Codes, class Norms,
          class Scalars>
VQ_FN void scalar_encode_blocks(X x, int n_tokens, int n_blocks, Signs signs, Quantizers quantizers,
                                Columns columns, Bytes blocks, Rows rows, Rows moved, Codes codes,
                                Norms norms, Scalars scalars, uint3 group, uint self,
                                uint n_threads) {
  const int eighth = (int)group.x, first = 64 * (int)group.y + 8 * eighth;
  const int64_t plane = group.z;
  const int code_bytes =
      STAGES * scalar_plane_bytes(DIM, BITS) + SKETCH * scalar_plane_bytes(DIM, 1);
  load_tile<DIM, 8>(x + plane * n_tokens * DIM, first, n_tokens, rows, self, n_threads);
  scalar_encode_rows<DIM, STAGES, BITS, SCALE, 1, 8>(rows, moved, signs, quantizers, codes, norms,
                                                     scalars, self, n_threads);
  if (SKETCH) {
    scalar_sketch_rows<DIM, 8>(rows, moved, columns, codes + STAGES * 8 * DIM, norms, scalars + 8,
                               self, n_threads);
  }
  Bytes block = blocks + (plane * n_blocks + group.y) * (code_bytes + (1 + SKETCH) * kScalarsBytes);
  // Eight codes of a row: tokens of a dimension, or dimensions of a token.
  for (uint i = self; i < (uint)((STAGES + SKETCH) * DIM); i += n_threads) {
    const int s = (int)i / DIM, unit = (int)i % DIM, bits = s < STAGES ? BITS : 1;
    const int token = BY_TOKEN ? unit / (DIM / 8) : 0, d = BY_TOKEN ? unit % (DIM / 8) * 8 : unit;
    uint32_t field = 0u;
    for (int k = 0; k < 8; ++k) {
      const int r = BY_TOKEN ? token : k;
      if (first + r >= n_tokens) continue;
      field |= (uint32_t)codes[(s * 8 + r) * DIM + (BY_TOKEN ? d + k : d)] << (bits * k);
    }
    Bytes to = block + s * scalar_plane_bytes(DIM, BITS) +
               (BY_TOKEN ? ((8 * eighth + token) * DIM + d) * bits / 8 : (8 * d + eighth) * bits);
    for (int b = 0; b < bits; ++b) to[b] = (uint8_t)(field >> (8 * b));
  }
  for (uint i = self; i < 8u * (1 + SKETCH); i += n_threads) {
    Bytes to = block + code_bytes + i / 8 * kScalarsBytes + 2 * (8 * eighth + i % 8);
    const uint32_t scalar = first + (int)(i % 8) < n_tokens ? scalars[i] : 0u;
    to[0] = (uint8_t)scalar;
    to[1] = (uint8_t)(scalar >> 8);
  }
}

// blocks (as 32-bit words) -> y [n_blocks * 64][DIM] in the codec's coordinates. rows: S [DIM][DIM]
// of the `prod` form. thread: (element of a block, block, plane).
template <int DIM, int STAGES, int BITS, int SKETCH, int BY_TOKEN, class Words, class Quantizers,
          class Sketch, class Out>
VQ_FN void scalar_decode_blocks(Words blocks, int n_blocks, Quantizers quantizers, Sketch sketch,
                                Out out, uint3 at) {
  const int t = (int)at.x / DIM, d = (int)at.x % DIM;
  const int plane_words = scalar_plane_bytes(DIM, BITS) / 4;
  const int code_words = STAGES * plane_words + SKETCH * scalar_plane_bytes(DIM, 1) / 4;
  const int64_t block = at.z * (int64_t)n_blocks + at.y;
  Words words = blocks + block * (code_words + (1 + SKETCH) * kScalarsBytes / 4);
  float y = 0.0f;
  if (BITS > 0) {
    float sum = 0.0f;
    for (int s = 0; s < STAGES; ++s) {
      const uint32_t code =
          bits_at(words + s * plane_words, (BY_TOKEN ? t * DIM + d : d * 64 + t) * BITS, BITS);
      const float level = symmetric_level(quantizers + s * kQuantizerNumbers, BITS, code);
      sum = s == 0 ? level : sum + level;
    }
    y = mul(half_at(words + code_words, t), sum);
  }
  if (SKETCH) {
    float sum = 0.0f;
    for (int i = 0; i < DIM; ++i) {
      const uint32_t bit =
          bits_at(words + STAGES * plane_words, BY_TOKEN ? t * DIM + i : i * 64 + t, 1);
      const float product = mul(bit ? 1.0f : -1.0f, (float)sketch[i * DIM + d]);
      sum = i == 0 ? product : sum + product;
    }
    y = y + mul(half_at(words + code_words + kScalarsBytes / 4, t), sum);
  }
  out[(block * 64) * DIM + at.x] = y;
}

}  // namespace veloxquant
