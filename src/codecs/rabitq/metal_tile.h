// Bit planes as attention reads them (src/attention/README.md, "Tiles on a GPU"): RaBitQ's blocks,
// and those of QJL, whose rows are signs of a sketch. A piece is a row.
#pragma once

#include "src/codecs/metal_rows.h"

namespace veloxquant {

// factor_of_all: what the stored scalars are multiplied with. mean: added to every token, [DIM_],
// or any pointer without MEAN.
template <int DIM_, int BITS, int MEAN, class Words, class Mean>
struct PlaneTile {
  enum { DIM = DIM_, SUB = 1, WORDS = 2 * DIM_ * BITS + 32 };
  Mean mean;
  float factor_of_all;
  Words words;
  uint32_t planes[BITS];  // of 32 tokens
  int held, row, first, at;

  void open(Words block) {
    words = block;
    held = -1;
  }
  void load(int m, uint w) {
    const int place = 2 * m + (int)w / 8;
    row = m;
    first = 4 * (int)w;
    if (place == held) return;
    held = place;
    for (int p = 0; p < BITS; ++p) planes[p] = words[(m * BITS + p) * 2 + (int)w / 8];
  }
  void token(uint i) { at = first + (int)i; }
  float value(int) const {
    uint32_t code = 0u;
    for (int p = 0; p < BITS; ++p) code |= ((planes[p] >> (at % 32)) & 1u) << p;
    const float level = (float)(2 * (int)code - ((1 << BITS) - 1));
    return MEAN ? fma(level, scalar(at), (float)mean[row]) : level;
  }
  float factor(int t) const { return MEAN ? 1.0f : scalar(t); }

  float scalar(int t) const { return factor_of_all * near_half_at(words + 2 * DIM_ * BITS, t); }
};

}  // namespace veloxquant
