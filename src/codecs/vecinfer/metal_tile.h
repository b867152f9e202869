// VecInfer's packed blocks as attention reads them (src/attention/README.md, "Tiles on a GPU"). A
// piece is a sub-vector.
#pragma once

#include "src/codecs/vecinfer/metal_codes.h"

namespace veloxquant {

// TABLES: 1, one table for all sub-vectors. Table: half, in whatever memory.
template <int DIM_, int SUB_, int C, int BITS, int TABLES, class Words, class Table>
struct VecInferTile {
  enum {
    DIM = DIM_,
    SUB = SUB_,
    WORDS = DIM_ / SUB_ * 2 * BITS,
    STRETCH = BITS == 8 ? 1 : 4,
    KINDS = 1,
    SHIFTED = 0
  };
  Table table;
  Words words;
  Table piece, entry;
  uint32_t low, high;
  uint32_t fours, twos;  // words of planes, of several w
  int four, two;         // which

  void open(Words block) {
    words = block;
    four = -1;
    two = -1;
  }
  void load(int m, uint w) {
    Words row = words + m * vecinfer_row_words(BITS);
    if (four != 8 * m + (int)(w % 8u)) fours = vecinfer_fours<BITS>(row, w);
    if (two != 4 * m + (int)(w % 4u)) twos = vecinfer_twos<BITS>(row, w);
    four = 8 * m + (int)(w % 8u);
    two = 4 * m + (int)(w % 4u);
    low = vecinfer_low_codes<BITS>(row, fours, twos, w);
    high = vecinfer_high_codes<BITS>(fours, twos, w);
    piece = table + (TABLES == 1 ? 0 : m * C * SUB_);
  }
  void token(uint i) { entry = piece + (int)vecinfer_code<BITS, C>(low, high, i) * SUB_; }
  float value(int j) const { return (float)entry[j]; }
  void factors(uint, VQ_THREAD float* to) const { all_ones(to); }
};

}  // namespace veloxquant
