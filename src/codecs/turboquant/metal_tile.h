// Packed blocks of the scalar codecs as attention reads them (src/attention/README.md, "Tiles on a
// GPU"): of keys a piece is a dimension, of values (BY_TOKEN) four neighbours.
#pragma once

#include "src/codecs/metal_rows.h"

namespace veloxquant {

// levels: [STAGES][16], by code.
template <int DIM_, int STAGES, int BITS, int BY_TOKEN, class Words, class Levels>
struct ScalarTile {
  enum {
    DIM = DIM_,
    SUB = BY_TOKEN ? 4 : 1,
    PLANE = 2 * DIM_ * BITS,
    WORDS = STAGES * PLANE + 32,
    STRETCH = 1,
    KINDS = 1,
    SHIFTED = 0
  };
  Levels levels;
  Words words;
  uint32_t codes[(BY_TOKEN ? 4 : 1) * STAGES];  // of each stage four; of values four of four tokens
  int at;

  void open(Words block) { words = block; }
  void load(int m, uint w) {
    for (int s = 0; s < STAGES; ++s) {
      VQ_THREAD uint32_t* to = codes + (BY_TOKEN ? 4 : 1) * s;
      if (BY_TOKEN) four_tokens<BITS, DIM_ / 4>(words + s * PLANE, w, m, to);
      if (!BY_TOKEN) *to = four_codes<BITS>(words + s * PLANE, m * 16u + w);
    }
  }
  void token(uint i) { at = (int)i; }
  float value(int j) const {
    float sum = 0.0f;
    for (int s = 0; s < STAGES; ++s) {
      const uint32_t four = codes[BY_TOKEN ? 4 * s + at : s];
      const uint32_t code = (four >> ((BY_TOKEN ? j : at) * BITS)) & ((1u << BITS) - 1u);
      sum = s == 0 ? levels[code] : sum + levels[16 * s + (int)code];
    }
    return sum;
  }
  void factors(uint w, VQ_THREAD float* to) const { four_halves(words + STAGES * PLANE, w, to); }
};

}  // namespace veloxquant
