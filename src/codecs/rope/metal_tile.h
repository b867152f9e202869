// Keys before RoPE as attention reads them (src/attention/README.md, "Tiles on a GPU"): a token's
// pairs are turned to its position when they are read. Queries come in the order of the slots,
// times the inverse weights.
#pragma once

#include "src/codecs/vecinfer/metal_tile.h"

namespace veloxquant {

// Cosine and sine of an angle below 2^17, off by 2^-23 at most: cos and sin of Metal's and CUDA's
// libraries are either slower or less exact for angles of some thousand turns.
VQ_FN void circle_at(float angle, VQ_THREAD float* c, VQ_THREAD float* s) {
  const float quarter_turns = angle * 0.636619772f;
  const int n = (int)(quarter_turns < 0.0f ? quarter_turns - 0.5f : quarter_turns + 0.5f);
  const float k = -(float)n;
  const float r = fma(k, -4.37113883e-08f, fma(k, 1.57079637f, angle)), r2 = r * r;
  const float sine =
      fma(r * r2, fma(r2, fma(r2, -1.94865643e-04f, 8.33190233e-03f), -0.166666493f), r);
  const float cosine =
      fma(r2 * r2, fma(r2, fma(r2, 2.44285529e-05f, -1.38872792e-03f), 4.16666456e-02f),
          fma(r2, -0.5f, 1.0f));
  const bool swapped = (n & 1) != 0;
  const float x = swapped ? sine : cosine, y = swapped ? cosine : sine;
  *c = ((n + 1) & 2) != 0 ? -x : x;
  *s = (n & 2) != 0 ? -y : y;
}

// Where a tile's tokens are, and what a slot turns by: numbers [slots][2], radians a position and
// the factor (0 and 1 where nothing rotates).
template <class Numbers>
struct Turning {
  Numbers numbers;
  float scale;
  int position, start;  // of the item's first block, of this one

  // The pair of a slot, at token t of the block.
  void turn(int slot, int t, VQ_THREAD float* a, VQ_THREAD float* b) const {
    float c, s;
    circle_at(mul(mul(scale, (float)(start + t)), numbers[2 * slot]), &c, &s);
    const float factor = numbers[2 * slot + 1], x = *a * factor, y = *b * factor;
    *a = x * c - y * s;
    *b = x * s + y * c;
  }
};

// VecInfer's codes of slots: a piece is a sub-vector of SUB_ / 2 pairs.
template <int DIM_, int SUB_, int C, int BITS, int TABLES, class Words, class Table, class Numbers>
struct PairsTile {
  enum { DIM = DIM_, SUB = SUB_, WORDS = DIM_ / SUB_ * 2 * BITS, SHIFTED = 0 };
  VecInferTile<DIM_, SUB_, C, BITS, TABLES, Words, Table> codes;
  Turning<Numbers> turning;
  Words first;  // block of the item
  float y[SUB_];
  int slot, four;

  void open(Words block) {
    codes.open(block);
    turning.start = turning.position + 64 * (int)((block - first) / WORDS);
  }
  void load(int m, uint w) {
    codes.load(m, w);
    slot = m * (SUB_ / 2);
    four = 4 * (int)w;
  }
  void token(uint i) {
    codes.token(i);
    for (int k = 0; k < SUB_ / 2; ++k) {
      float a = codes.value(2 * k), b = codes.value(2 * k + 1);
      turning.turn(slot + k, four + (int)i, &a, &b);
      y[2 * k] = a;
      y[2 * k + 1] = b;
    }
  }
  float value(int j) const { return y[j]; }
  void factors(uint, VQ_THREAD float* to) const { all_ones(to); }
};

}  // namespace veloxquant
