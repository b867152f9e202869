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
  uint32_t codes[(BY_TOKEN ? 4 : 1) * STAGES];  // four of each stage; of values four a token
  int at;

  void open(Words block) { words = block; }
  void load(int m, uint w) {
    for (int i = 0; i < (BY_TOKEN ? 4 : 1); ++i) {
      const int first = BY_TOKEN ? 4 * ((4 * (int)w + i) * (DIM_ / 4) + m) : m * 64 + 4 * (int)w;
      for (int s = 0; s < STAGES; ++s) {
        // Four neighbours of 1, 2 or 4 bits lie in one word.
        const int at_bit = first * BITS;
        codes[i * STAGES + s] = BITS == 3 ? bits_at(words + s * PLANE, at_bit, 4 * BITS)
                                          : words[s * PLANE + at_bit / 32] >> (at_bit % 32);
      }
    }
  }
  void token(uint i) { at = (int)i; }
  float value(int j) const {
    float sum = 0.0f;
    for (int s = 0; s < STAGES; ++s) {
      const uint32_t four = codes[(BY_TOKEN ? at * STAGES : 0) + s];
      const uint32_t code = (four >> ((BY_TOKEN ? j : at) * BITS)) & ((1u << BITS) - 1u);
      sum = s == 0 ? levels[code] : sum + levels[16 * s + (int)code];
    }
    return sum;
  }
  float factor(int t) const { return near_half_at(words + STAGES * PLANE, t); }
};

}  // namespace veloxquant
