// Fragment order: where the code of a token and sub-vector lies on the device.
//
// Tensor cores take their operands spread over the 32 lanes of a warp, g = lane / 4, i = lane % 4.
// A look-up turns one 8-bit code into one 4-byte register (four int8 or two fp16 dimensions), so
// the codes are stored in the order in which the lanes need them: one wide load brings a lane the
// codes of a step and nothing is shuffled or staged. A step is 32 tokens of one KV head,
// sub-vectors in chunks of 8 (M is padded with code 0 to whole chunks):
//
//   keys    operand B, 8 tokens (columns g) x 8 sub-vectors a product: tile 0..3 of the step,
//           chunk c, register r: sub-vector 8c + 4r + i of token key_token(tile, g)
//   values  operand A, 8 sub-vectors (rows g) x tokens: half 0..1 of the step, chunk c, byte j:
//           sub-vector 8c + g of token 16 half + 4i + j
//
// The key tokens are dealt out so that the lane that holds the score of a token is the lane that
// needs its probability: with tile = (pair j / 2, half), column 2i + j % 2 is token 16 half + 4i +
// j.
#pragma once

#include "src/math/portable.h"

namespace veloxquant::vecinfer {

constexpr int kStepTokens = 32;

VQ_FN int fragment_chunks(int n_subvectors) { return (n_subvectors + 7) / 8; }

// Bytes of one step of 32 tokens; a block of 64 tokens is two of them.
VQ_FN int fragment_step_bytes(int n_chunks) { return 256 * n_chunks; }

// Word w = 0 .. 2 chunks - 1 of a lane: words lie 4 (even number of chunks) or 2 to a load, lane by
// lane.
VQ_FN int fragment_word_offset(int n_chunks, int lane, int w) {
  const int width = n_chunks % 2 == 0 ? 4 : 2;
  return ((w / width) * 32 + lane) * width * 4 + (w % width) * 4;
}

VQ_FN int key_token(int tile, int g) {
  return 16 * (tile & 1) + 4 * (g >> 1) + 2 * (tile >> 1) + (g & 1);
}

// Which token (of 32) and sub-vector byte `byte` of word `w` of `lane` holds.
VQ_FN void key_fragment(int n_chunks, int lane, int w, int byte, int* token, int* subvector) {
  const int half_word = 2 * w + byte / 2;
  *token = key_token(half_word / n_chunks, lane / 4);
  *subvector = 8 * (half_word % n_chunks) + 4 * (byte % 2) + lane % 4;
}
VQ_FN void value_fragment(int n_chunks, int lane, int w, int byte, int* token, int* subvector) {
  *token = 16 * (w / n_chunks) + 4 * (lane % 4) + byte;
  *subvector = 8 * (w % n_chunks) + lane / 4;
}

// Byte offset inside its step of the code of (token, subvector): the inverse of the above.
VQ_FN int key_offset(int n_chunks, int token, int subvector) {
  const int half = token / 16, i = token % 16 / 4, j = token % 4;
  const int tile = 2 * (j / 2) + half, g = 2 * i + j % 2;
  const int chunk = subvector / 8, r = subvector % 8 / 4, lane = 4 * g + subvector % 4;
  const int half_word = tile * n_chunks + chunk;
  return fragment_word_offset(n_chunks, lane, half_word / 2) + half_word % 2 * 2 + r;
}
VQ_FN int value_offset(int n_chunks, int token, int subvector) {
  const int lane = 4 * (subvector % 8) + token % 16 / 4;
  return fragment_word_offset(n_chunks, lane, token / 16 * n_chunks + subvector / 8) + token % 4;
}

}  // namespace veloxquant::vecinfer
