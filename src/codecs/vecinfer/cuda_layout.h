// Fragment order: where the code of a token and sub-vector lies on the device.
//
// Tensor cores take their operands spread over the 32 lanes of a warp, g = lane / 4, i = lane % 4.
// A look-up turns one 8-bit code into one 4-byte register (four int8 or two fp16 dimensions), so
// the codes are stored in the order in which the lanes need them: one wide load brings a lane the
// codes of a step and nothing is shuffled or staged. A step is 32 tokens of one KV head,
// sub-vectors in chunks of 8 (M is padded with code 0 to whole chunks):
//
//   keys    operand A, 16 tokens (rows g and g + 8) x 8 sub-vectors a product: tile 0..1 of the
//           step, chunk c, byte u + 2r: sub-vector 8c + 4r + i of token key_token(tile, g, u)
//   values  operand A, 8 sub-vectors (rows g) x tokens: half 0..1 of the step, chunk c, byte j:
//           sub-vector 8c + g of token 16 half + 4i + j
//
// The key tokens are dealt out so that transposing 8 x 8 pairs of probabilities (movmatrix), a pair
// being those of rows g and g + 8, leaves each lane the four neighbours that it multiplies values
// with.
#pragma once

#include "src/math/portable.h"

namespace veloxquant {  // C++14: this is kernel text as well
namespace vecinfer {

enum { kStepTokens = 32 };

VQ_FN int fragment_chunks(int n_subvectors) { return (n_subvectors + 7) / 8; }

// Bytes of one step of 32 tokens; a block of 64 tokens is two of them.
VQ_FN int fragment_step_bytes(int n_chunks) { return 256 * n_chunks; }

// Word w = 0 .. 2 chunks - 1 of a lane: words lie 4 (even number of chunks) or 2 to a load, lane by
// lane.
VQ_FN int fragment_word_offset(int n_chunks, int lane, int w) {
  const int width = n_chunks % 2 == 0 ? 4 : 2;
  return ((w / width) * 32 + lane) * width * 4 + (w % width) * 4;
}

// Operand B of a transform y = x M, tiles of 16 x 16: the row of the lane's n-th number (0 .. 3) at
// a step, and its column of half 0 or 1 of a tile, such that a lane's results are neighbours.
VQ_FN int matrix_row(int step, int lane, int n) {
  return 16 * step + 2 * (lane % 4) + n % 2 + 8 * (n / 2);
}
VQ_FN int matrix_column(int tile, int half, int lane) {
  return 16 * tile + 4 * (lane / 8) + 2 * half + lane / 4 % 2;
}

VQ_FN int key_token(int tile, int g, int u) { return 16 * tile + 2 * g + u; }

// Which token (of 32) and sub-vector byte `byte` of word `w` of `lane` holds.
VQ_FN void key_fragment(int n_chunks, int lane, int w, int byte, VQ_THREAD int* token,
                        VQ_THREAD int* subvector) {
  *token = key_token(w / n_chunks, lane / 4, byte % 2);
  *subvector = 8 * (w % n_chunks) + 4 * (byte / 2) + lane % 4;
}
VQ_FN void value_fragment(int n_chunks, int lane, int w, int byte, VQ_THREAD int* token,
                          VQ_THREAD int* subvector) {
  *token = 16 * (w / n_chunks) + 4 * (lane % 4) + byte;
  *subvector = 8 * (w % n_chunks) + lane / 4;
}

// Byte offset inside its step of the code of (token, subvector): the inverse of the above.
VQ_FN int key_offset(int n_chunks, int token, int subvector) {
  const int lane = 4 * (token % 16 / 2) + subvector % 4;
  return fragment_word_offset(n_chunks, lane, token / 16 * n_chunks + subvector / 8) + token % 2 +
         subvector % 8 / 4 * 2;
}
VQ_FN int value_offset(int n_chunks, int token, int subvector) {
  const int lane = 4 * (subvector % 8) + token % 16 / 4;
  return fragment_word_offset(n_chunks, lane, token / 16 * n_chunks + subvector / 8) + token % 4;
}

}  // namespace vecinfer
}  // namespace veloxquant
