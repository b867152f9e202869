// Exact blocks as attention reads them (src/attention/README.md, "Tiles on a GPU"). A piece is four
// neighbouring dimensions of a token, two words.
#pragma once

#include "src/codecs/metal_rows.h"

namespace veloxquant {

template <int DIM_, int BFLOAT, class Words>
struct SixteenBitTile {
  enum { DIM = DIM_, SUB = 4, WORDS = 32 * DIM_, STRETCH = 1, KINDS = 1, SHIFTED = 0 };
  Words words;
  uint32_t pairs[8];  // of four tokens
  int at;

  void open(Words block) { words = block; }
  void load(int m, uint w) {
    for (int i = 0; i < 4; ++i) {
      Words row = words + (4 * (int)w + i) * (DIM_ / 2) + 2 * m;
      pairs[2 * i] = row[0];
      pairs[2 * i + 1] = row[1];
    }
  }
  void token(uint i) { at = 2 * (int)i; }
  float value(int j) const {
    const uint32_t bits = (pairs[at + j / 2] >> (16 * (j % 2))) & 0xffffu;
    return BFLOAT ? float_of(bits << 16) : (float)as_type<half>((ushort)bits);
  }
  void factors(uint, VQ_THREAD float* to) const { all_ones(to); }
};

}  // namespace veloxquant
