// VecInfer's packed blocks as attention reads them (src/attention/README.md, "Tiles on a GPU"). A
// piece is a sub-vector.
#pragma once

#include "src/codecs/vecinfer/metal_codes.h"

namespace veloxquant {

// TABLES: 1, one table for all sub-vectors. Table: half, in whatever memory.
template <int DIM_, int SUB_, int C, int BITS, int TABLES, class Words, class Table>
struct VecInferTile {
  enum { DIM = DIM_, SUB = SUB_, WORDS = DIM_ / SUB_ * 2 * BITS };
  Table table;
  Words words;
  Table piece, entry;
  uint32_t low, high;

  void open(Words block) { words = block; }
  void load(int m, uint w) {
    Words row = words + m * vecinfer_row_words(BITS);
    low = vecinfer_low_codes<BITS>(row, w);
    high = vecinfer_high_codes<BITS>(row, w);
    piece = table + (TABLES == 1 ? 0 : m * C * SUB_);
  }
  void token(uint i) { entry = piece + (int)vecinfer_code<BITS, C>(low, high, i) * SUB_; }
  float value(int j) const { return (float)entry[j]; }
  float factor(int) const { return 1.0f; }
};

}  // namespace veloxquant
