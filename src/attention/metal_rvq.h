// Attention over two-stage scalar codes of keys and vector codes of values, a byte a code
// (veloxquant/rvq_attend.h), on Metal: the passes of metal_decode.h over tiles of plain bytes.
#pragma once

#include "src/attention/metal_decode.h"

namespace veloxquant {

// Codes [tokens][DIM] of two stages; a piece is four dimensions. Tables of N1 and N2 entries; codes
// beyond them read the last. last: of the tokens; what lies behind is read as the last token.
template <int DIM_, int N1, int N2, class Bytes, class Table, class Norms>
struct StagedBytesTile {
  enum { DIM = DIM_, SUB = 4, WORDS = 64 * DIM_, SHIFTED = 0 };
  Bytes stage1, stage2, first, second;  // of all tokens, and of the block
  Table table1, table2;
  Norms norms;
  bool has_norms;
  int last, block, at;
  uint8_t codes1[16], codes2[16];

  void open(Bytes bytes) {
    first = bytes;
    second = stage2 + (bytes - stage1);
    block = (int)((bytes - stage1) / DIM_);
  }
  void load(int m, uint w) {
    for (int i = 0; i < 4; ++i) {
      const int t = min(4 * (int)w + i, last - block);
      for (int j = 0; j < 4; ++j) {
        codes1[4 * i + j] = first[t * DIM_ + 4 * m + j];
        codes2[4 * i + j] = second[t * DIM_ + 4 * m + j];
      }
    }
  }
  void token(uint i) { at = 4 * (int)i; }
  float value(int j) const {
    return table1[min((int)codes1[at + j], N1 - 1)] + table2[min((int)codes2[at + j], N2 - 1)];
  }
  void factors(uint w, VQ_THREAD float* to) const {
    for (int i = 0; i < 4; ++i) {
      to[i] = has_norms ? (float)norms[min(block + 4 * (int)w + i, last)] : 1.0f;
    }
  }
};

// Codes [tokens][M], a piece is a sub-vector of SUB_ dimensions; C entries.
template <int M, int SUB_, int C, class Bytes, class Table>
struct VectorBytesTile {
  enum { DIM = M * SUB_, SUB = SUB_, WORDS = 64 * M, STRETCH = 1, KINDS = 1, SHIFTED = 0 };
  Bytes values, codes;
  Table table;
  int last, block, entry;
  uint8_t four[4];

  void open(Bytes bytes) {
    codes = bytes;
    block = (int)((bytes - values) / M);
  }
  void load(int m, uint w) {
    for (int i = 0; i < 4; ++i) four[i] = codes[min(4 * (int)w + i, last - block) * M + m];
  }
  void token(uint i) { entry = min((int)four[i], C - 1) * SUB_; }
  float value(int j) const { return table[entry + j]; }
  void factors(uint, VQ_THREAD float* to) const { all_ones(to); }
};

}  // namespace veloxquant
