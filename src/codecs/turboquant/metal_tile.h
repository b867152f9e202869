// Packed blocks of the scalar codecs as attention reads them (src/attention/README.md, "Tiles on a
// GPU"): of keys a piece is a dimension, of values (BY_TOKEN) four neighbours.
#pragma once

#include "src/codecs/metal_rows.h"

namespace veloxquant {

// levels: [STAGES][16], by code.
template <int DIM_, int STAGES, int BITS, int BY_TOKEN, class Words, class Levels>
struct ScalarTile {
  enum { DIM = DIM_, SUB = BY_TOKEN ? 4 : 1, PLANE = 2 * DIM_ * BITS, WORDS = STAGES * PLANE + 32 };
  Levels levels;
  Words words;
  uint32_t codes[STAGES];  // four of each stage
  int place, at;

  void open(Words block) { words = block; }
  void load(int m, uint w) {
    place = BY_TOKEN ? 4 * ((int)w * DIM_ + m) : m * 64 + 4 * (int)w;
    if (!BY_TOKEN) read(place);
  }
  void token(uint i) {
    if (BY_TOKEN) read(place + (int)i * DIM_);
    at = BY_TOKEN ? 0 : (int)i;
  }
  float value(int j) const {
    float sum = 0.0f;
    for (int s = 0; s < STAGES; ++s) {
      const uint32_t code = (codes[s] >> ((BY_TOKEN ? j : at) * BITS)) & ((1u << BITS) - 1u);
      sum = s == 0 ? levels[code] : sum + levels[16 * s + (int)code];
    }
    return sum;
  }
  float factor(int t) const { return half_at(words + STAGES * PLANE, t); }

  void read(int first) {
    for (int s = 0; s < STAGES; ++s) {
      codes[s] = bits_at(words + s * PLANE, first * BITS, 4 * BITS);
    }
  }
};

}  // namespace veloxquant
