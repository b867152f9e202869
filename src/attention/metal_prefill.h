// Fused attention of a chunk of queries over packed codes and exact tokens on Metal: the first pass
// of metal_decode.h for many query rows. A threadgroup takes an item of the plan for ROWS of them.
// TOKENS keys at a time are decoded once, into threadgroup memory in fp32, and scored by all rows;
// then the values of the same tokens, in the same place.
//
// Sixteen lanes own RP = ROWS / 8 rows: a lane scores one token of the tile for each (or a part of
// its dimensions, where a tile has fewer tokens), and keeps every sixteenth dimension of their sums
// in registers. So a row's softmax stays within its lanes, and nothing is merged at the end.
#pragma once

#include "src/attention/metal_decode.h"

namespace veloxquant {

// Tokens first .. of the packed blocks, as rows of STRIDE numbers.
template <int TOKENS, int STRIDE, class Tile, class Blocks, class To>
VQ_FN void decode_tokens(Tile tile, Blocks blocks, int first, To to, uint self, uint n_threads) {
  const int words = TOKENS / 4;
  tile.open(block_at<Tile::WORDS>(blocks, first / 64));
  for (int i = (int)self; i < Tile::DIM / Tile::SUB * words; i += (int)n_threads) {
    const int m = i / words, own = i % words;
    const uint w = (uint)(first % 64 / 4 + own);
    tile.load(m, w);
    float factor[4];
    tile.factors(w, factor);
    for (uint t = 0; t < 4; ++t) {
      tile.token(t);
      To row = to + (4 * own + (int)t) * STRIDE + m * Tile::SUB;
      for (int j = 0; j < Tile::SUB; ++j) {
        row[j] = fma(tile.value(j), factor[t], shift_of(tile, m * Tile::SUB + j));
      }
    }
  }
}

template <int TOKENS, int KSTRIDE, int VSTRIDE, class KeyTile, class ValueTile, class KeyBlocks,
          class ValueBlocks>
struct PackedTokens {
  enum { KEYS = KeyTile::DIM, VALUES = ValueTile::DIM, PACKED = 1 };
  KeyTile key_tile;
  ValueTile value_tile;
  KeyBlocks key_blocks;
  ValueBlocks value_blocks;

  template <class To>
  void keys(int first, int, To to, uint self, uint n_threads) const {
    decode_tokens<TOKENS, KSTRIDE>(key_tile, key_blocks, first, to, self, n_threads);
  }
  template <class To>
  void values(int first, int, To to, uint self, uint n_threads) const {
    decode_tokens<TOKENS, VSTRIDE>(value_tile, value_blocks, first, to, self, n_threads);
  }
};

template <int TOKENS, int KSTRIDE, int VSTRIDE, int DIM, int BFLOAT, class Keys, class Values>
struct ExactTokens {
  enum { KEYS = DIM, VALUES = DIM, PACKED = 0 };
  Keys key_rows;
  Values value_rows;
  int64_t key_step, value_step;

  template <int STRIDE, class Rows, class To>
  void copy(Rows rows, int64_t step, int first, int n_tokens, To to, uint self,
            uint n_threads) const {
    for (int i = (int)self; i < TOKENS * DIM; i += (int)n_threads) {
      const int t = i / DIM, d = i % DIM;
      const bool there = first + t < n_tokens;
      to[t * STRIDE + d] = there ? as_kept<BFLOAT>(rows[(first + t) * step + d]) : 0.0f;
    }
  }
  template <class To>
  void keys(int first, int n_tokens, To to, uint self, uint n_threads) const {
    copy<KSTRIDE>(key_rows, key_step, first, n_tokens, to, self, n_threads);
  }
  template <class To>
  void values(int first, int n_tokens, To to, uint self, uint n_threads) const {
    copy<VSTRIDE>(value_rows, value_step, first, n_tokens, to, self, n_threads);
  }
};

// The largest, or the sum, of sixteen lanes' numbers.
VQ_FN float largest_of_lanes(float x) {
  for (ushort width = 8; width > 0; width /= 2) x = max(x, simd_shuffle_xor(x, width));
  return x;
}
VQ_FN float sum_of_lanes(float x) {
  for (ushort width = 8; width > 0; width /= 2) x = x + simd_shuffle_xor(x, width);
  return x;
}

// Tokens from .. n_tokens of an item, `from` at the start of a tile. q: [RP][QDIM] of this lane's
// rows; tile: as large as keys or values; weights: [RP][TOKENS] of these rows. own: [RP][N].
template <int RP, int QDIM, int TOKENS, int KSTRIDE, int VSTRIDE, int SOFTCAP, int MASK, int N,
          class Source, class Q, class To, class P, class Seen, class Mask>
VQ_FN void attend_tokens(Source source, int from, int n_tokens, int position, Q q, To tile,
                         P weights, float cap, Seen seen, VQ_THREAD const int* query, Mask mask,
                         VQ_THREAD const int64_t* mask_row, int64_t mask_step,
                         VQ_THREAD float (*own)[N], VQ_THREAD float* maximum, VQ_THREAD float* sum,
                         uint self, uint n_threads) {
  const int c = (int)self % 16, token = c % TOKENS, part = c / TOKENS, parts = 16 / TOKENS;
  const int share = Source::KEYS / parts;
  for (int first = from; first < n_tokens; first += TOKENS) {
    barrier_of_group();
    source.keys(first, n_tokens, tile, self, n_threads);
    barrier_of_group();
    float score[RP];
    for (int r = 0; r < RP; ++r) score[r] = 0.0f;
    To key = tile + token * KSTRIDE + part * share;
    Q row = q + part * share;
#pragma unroll 8
    for (int d = 0; d < share; ++d) {
      const float y = key[d];
      for (int r = 0; r < RP; ++r) score[r] = fma(row[r * QDIM + d], y, score[r]);
    }
    const int at = first + token;
    for (int r = 0; r < RP; ++r) {
      float whole = score[r];
      for (ushort width = TOKENS; width < 16; width *= 2) whole += simd_shuffle_xor(whole, width);
      whole =
          finished_score<SOFTCAP, MASK>(whole, cap, seen, query[r], Source::PACKED != 0,
                                        position + at, at < n_tokens, mask, mask_row[r], mask_step);
      const float next = max(maximum[r], largest_of_lanes(whole));
      const float keep = power_below(maximum[r], next), power = power_below(whole, next);
      if (part == 0) weights[r * TOKENS + token] = power;
      sum[r] = sum[r] * keep + sum_of_lanes(power) / (float)parts;
      maximum[r] = next;
      for (int k = 0; k < N; ++k) own[r][k] *= keep;
    }
    barrier_of_group();  // all have read the keys
    source.values(first, n_tokens, tile, self, n_threads);
    barrier_of_group();
    for (int t = 0; t < TOKENS; ++t) {
      float weight[RP];
      for (int r = 0; r < RP; ++r) weight[r] = weights[r * TOKENS + t];
      for (int k = 0; k < N; ++k) {
        const int d = c + 16 * k;
        if (d >= Source::VALUES) continue;
        const float y = tile[t * VSTRIDE + d];
        for (int r = 0; r < RP; ++r) own[r][k] = fma(weight[r], y, own[r][k]);
      }
    }
  }
}

}  // namespace veloxquant
