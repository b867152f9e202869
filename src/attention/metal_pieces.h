// How a simdgroup's lanes share the pieces of a block that decode attention reads (metal_decode.h),
// so that its loads ask for every packed byte once.
#pragma once

#include "src/math/portable.h"

namespace veloxquant {

// Rows and sub-vectors to lanes for the sums of values: lane = part * LANES + m, LANES the power of
// two of sub-vectors that a pass takes; `parts` lanes share a sub-vector and split its tokens, four
// of a block at least.
VQ_FN int value_lanes(int n_subvectors) {
  int lanes = 2;
  while (lanes < n_subvectors && lanes < 32) lanes *= 2;
  return lanes;
}

// The piece that number k of a lane's passes is of, by kind one after the other, n pieces of each;
// -1 where the lane has none.
VQ_FN int value_piece(int k, int n, int lane) {
  const int lanes = value_lanes(n), passes = (n + lanes - 1) / lanes;
  const int m = lane % lanes + k % passes * lanes;
  return m < n ? m + k / passes * n : -1;
}

// What a tile's numbers of dimension d have added after their factor (SHIFTED); most have nothing.
template <class Tile>
VQ_FN float shift_of(VQ_THREAD const Tile&, int) {
  return 0.0f;
}

// What queries times shifts add to every score of a row; all lanes.
template <int ROWS, class Tile, class Q>
VQ_FN void score_shifts(VQ_THREAD const Tile& tile, Q q, VQ_THREAD float* to, uint lane) {
  for (int r = 0; r < ROWS; ++r) to[r] = 0.0f;
  if (!Tile::SHIFTED) return;
  for (int d = (int)lane; d < Tile::DIM; d += 32) {
    const float y = shift_of(tile, d);
    for (int r = 0; r < ROWS; ++r) to[r] = fma(q[r * Tile::DIM + d], y, to[r]);
  }
  for (int r = 0; r < ROWS; ++r) to[r] = simd_sum(to[r]);
}

// Scores of tokens 4 word .. 4 word + 3 of the block that is open, before their factors, of half
// the pieces: a lane has every other one.
template <int ROWS, class Tile, class Q>
VQ_FN void score_tokens(VQ_THREAD Tile& keys, Q q, uint word, int side,
                        VQ_THREAD float (*score)[4]) {
  const int SUB = Tile::SUB, DIM = Tile::DIM;
// Codes of the next pieces are asked for before these are used.
#pragma unroll(SUB >= 4 ? 2 : 4)
  for (int m = side; m < DIM / SUB; m += 2) {
    keys.load(m, word);
    for (uint i = 0; i < 4; ++i) {
      keys.token(i);
      for (int j = 0; j < SUB; ++j) {
        const float y = keys.value(j);
        for (int r = 0; r < ROWS; ++r) {
          score[r][i] = fma(q[r * DIM + m * SUB + j], y, score[r][i]);
        }
      }
    }
  }
}

// Word i of the n that a lane sums values of: those whose codes share words of memory, STRETCH of
// them, one after the other.
template <int STRETCH>
VQ_FN uint stretch_word(int i, int n) {
  const int apart = n / STRETCH;
  if (STRETCH != 4 || apart == 0) return (uint)i;
  // The second and the fourth share planes of four bits (metal_codes.h), all of them those of two.
  const int at = i % 4;
  return (uint)(i / 4 + apart * (at % 2 * 2 + at / 2));
}

}  // namespace veloxquant
