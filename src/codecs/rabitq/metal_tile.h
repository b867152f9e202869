// Bit planes as attention reads them (src/attention/README.md, "Tiles on a GPU"): RaBitQ's blocks,
// and those of QJL, whose rows are signs of a sketch. A piece is a row.
#pragma once

#include "src/codecs/metal_rows.h"

namespace veloxquant {

// factor_of_all: what the stored scalars are multiplied with. mean: added to every token, [DIM_],
// or any pointer without MEAN; the same for all tokens, so it is added to sums (shift).
template <int DIM_, int BITS, int MEAN, class Words, class Mean>
struct PlaneTile {
  enum {
    DIM = DIM_,
    SUB = 1,
    WORDS = 2 * DIM_ * BITS + 32,
    STRETCH = 8,
    KINDS = 1,
    SHIFTED = MEAN
  };
  Mean mean;
  float factor_of_all;
  Words words;
  uint32_t planes[BITS];  // of 32 tokens
  int held, first, at;

  void open(Words block) {
    words = block;
    held = -1;
  }
  void load(int m, uint w) {
    const int place = 2 * m + (int)w / 8;
    first = 4 * (int)w;
    if (place == held) return;
    held = place;
    for (int p = 0; p < BITS; ++p) planes[p] = words[(m * BITS + p) * 2 + (int)w / 8];
  }
  void token(uint i) { at = first + (int)i; }
  float value(int) const {
    uint32_t code = 0u;
    for (int p = 0; p < BITS; ++p) code |= ((planes[p] >> (at % 32)) & 1u) << p;
    return (float)(2 * (int)code - ((1 << BITS) - 1));
  }
  void factors(uint w, VQ_THREAD float* to) const {
    four_halves(words + 2 * DIM_ * BITS, w, to);
    for (int i = 0; i < 4; ++i) to[i] *= factor_of_all;
  }
};

template <int DIM_, int BITS, int MEAN, class Words, class Mean>
VQ_FN float shift_of(VQ_THREAD const PlaneTile<DIM_, BITS, MEAN, Words, Mean>& tile, int d) {
  return MEAN ? (float)tile.mean[d] : 0.0f;
}

}  // namespace veloxquant
