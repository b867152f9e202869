// Operands of keys and values for tensor cores: exact tokens as a tile, operands from a tile itself
// or from memory that simdgroups share.
//
// A side's tile, of a codec in src/codecs/*/metal_pairs.h: open() at a block; factor_word() and
// factor(), what a token is multiplied with; load_keys() and load_values() ask for codes,
// arrive_keys() and arrive_values() wait for them, key_pairs() and value_pairs() are the operands.
#pragma once

#include "src/codecs/metal_pairs.h"

namespace veloxquant {

// Exact tokens as a tile. Rows: of ushort, or of uint2 (WIDE); absent tokens are 0.
template <int DIM_, int BFLOAT, int WIDE, class Rows>
struct ExactPairs {
  enum { DIM = DIM_, WORDS = 0, FACTORED = 0 };
  Rows rows;
  int64_t step;  // from one token to the next
  int n;
  uint2 four[8];

  void open(Rows first, int n_tokens) {
    rows = first;
    n = n_tokens;
  }
  uint32_t factor_word(int) const { return 0u; }
  float factor(uint32_t, int) const { return 1.0f; }
  void arrive_keys() {}
  void arrive_values() {}

  static uint32_t kept(uint32_t pair) {
    if (!BFLOAT) return pair;
    const float most = 65504.0f;
    return half_pair(clamp(float_of(pair << 16), -most, most),
                     clamp(float_of(pair & 0xffff0000u), -most, most));
  }
  static uint2 quad(const device uint2* at) {
    const uint2 both = *at;
    const uint2 pairs = {kept(both.x), kept(both.y)};
    return pairs;
  }
  static uint2 quad(const device ushort* at) {
    const uint2 pairs = {kept((uint32_t)at[0] | ((uint32_t)at[1] << 16)),
                         kept((uint32_t)at[2] | ((uint32_t)at[3] << 16))};
    return pairs;
  }
  void load(int to, int token, int quad_number) {
    const uint2 none = {0u, 0u};
    four[to] = none;
    if (token < n) four[to] = quad(rows + (token * step + (WIDE ? 1 : 4) * quad_number));
  }
  void load_keys(int quad_number, uint g) {
    VQ_UNROLL for (int j = 0; j < 8; ++j) load(j, 8 * (int)g + j, quad_number);
  }
  template <int N>
  void key_pairs(int from, VQ_THREAD uint32_t (*w)[2]) const {
    VQ_UNROLL for (int j = 0; j < N; ++j) {
      w[j][0] = four[from + j].x;
      w[j][1] = four[from + j].y;
    }
  }
  void load_values(int quads, int u, int s, uint g, uint c) {
    const int t = 16 * (int)c + 2 * s, quad_number = value_quad<DIM_>(quads, u, g);
    load(0, t, quad_number);
    load(1, t + 8, quad_number);
    load(2, t + 1, quad_number);
    load(3, t + 9, quad_number);
  }
  void value_pairs(VQ_THREAD uint32_t (*w)[2]) const {
    turned_pairs(four[0], four[1], four[2], four[3], w);
  }
};

// What tokens of a tile are multiplied with, [2][64]: keys, then values; 0 for absent ones. By 32
// lanes, or a number by each of 128 threads: asked for early, stored late.
template <class Keys, class Values>
VQ_FN uint32_t factor_word(VQ_THREAD const Keys& keys, VQ_THREAD const Values& values,
                           uint number) {
  if (Keys::FACTORED && number < 64) return keys.factor_word((int)number);
  return Values::FACTORED && number >= 64 && number < 128 ? values.factor_word((int)number - 64)
                                                          : 0u;
}
template <class Keys, class Values, class Factors>
VQ_FN void put_factor(VQ_THREAD const Keys& keys, VQ_THREAD const Values& values, uint32_t word,
                      int n, Factors factors, uint number) {
  const int t = (int)number % 64;
  if (Keys::FACTORED && number < 64) factors[t] = t < n ? keys.factor(word, t) : 0.0f;
  if (Values::FACTORED && number >= 64 && number < 128) {
    factors[64 + t] = t < n ? values.factor(word, t) : 0.0f;
  }
}

// Operands of keys and values from a tile itself: quads beyond its dimensions are its last one,
// which meets zeros of the query, or sums that nobody asks for.
template <class Tile>
struct TileOperands {
  Tile tile;
  void load_keys(int s, uint lane) {
    const int quad = 4 * s + (int)(lane % 4);
    tile.load_keys(Tile::DIM % 16 == 0 ? quad : min(quad, Tile::DIM / 4 - 1), lane / 4);
  }
  // unit: 4 u + s.
  void load_values(int quads, int unit, uint lane) {
    tile.load_values(quads, unit / 4, unit % 4, lane / 4, lane % 4);
  }
  // Tokens from .. from + N - 1 of the lane's eight.
  template <int N>
  void keys(int s, int from, uint lane, VQ_THREAD uint32_t (*w)[2]) {
    load_keys(s, lane);
    tile.arrive_keys();
    tile.template key_pairs<N>(from, w);
  }
  void values(int quads, int unit, uint lane, VQ_THREAD uint32_t (*w)[2]) {
    load_values(quads, unit, lane);
    tile.arrive_values();
    tile.value_pairs(w);
  }
};

// The same from memory of the threadgroup, where the simdgroups left them.
template <class Store>
struct StoredOperands {
  Store store;
  template <int N>
  void keys(int s, int from, uint lane, VQ_THREAD uint32_t (*w)[2]) {
    VQ_UNROLL for (int i = 0; i < N / 2; ++i) {
      const uint4 four = store[(4 * s + from / 2 + i) * 32 + (int)lane];
      w[2 * i][0] = four.x, w[2 * i][1] = four.y, w[2 * i + 1][0] = four.z,
            w[2 * i + 1][1] = four.w;
    }
  }
  void values(int, int unit, uint lane, VQ_THREAD uint32_t (*w)[2]) {
    VQ_UNROLL for (int i = 0; i < 2; ++i) {
      const uint4 four = store[(2 * unit + i) * 32 + (int)lane];
      w[2 * i][0] = four.x, w[2 * i][1] = four.y, w[2 * i + 1][0] = four.z,
            w[2 * i + 1][1] = four.w;
    }
  }
};
template <int PAIRS, class Store>
VQ_FN void store_operands(VQ_THREAD const uint32_t (*w)[2], Store store, int unit, uint lane) {
  VQ_UNROLL for (int i = 0; i < PAIRS / 2; ++i) {
    const uint4 four = {w[2 * i][0], w[2 * i][1], w[2 * i + 1][0], w[2 * i + 1][1]};
    store[(unit * (PAIRS / 2) + i) * 32 + (int)lane] = four;
  }
}

}  // namespace veloxquant
