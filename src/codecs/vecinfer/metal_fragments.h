// VecInfer's codes in the fragment order of CUDA's tensor-core kernels (cuda_layout.h), as the
// general attention reads a tile: what those kernels do not cover runs on the same codes.
#pragma once

#include "src/codecs/vecinfer/cuda_layout.h"

namespace veloxquant {

// CHUNKS: of 8 sub-vectors, padding included. Table: half, in whatever memory.
template <int DIM_, int SUB_, int C, int TABLES, int VALUES, int CHUNKS, class Words, class Table>
struct FragmentTile {
  enum { DIM = DIM_, SUB = SUB_, WORDS = 128 * CHUNKS };
  Table table;
  Words words;
  Table piece, entry;
  uint32_t codes;  // of four tokens

  void open(Words block) { words = block; }
  void load(int m, uint w) {
    Words step = words + (int)(w / 8u) * (64 * CHUNKS);
    const int token = 4 * (int)(w % 8u);
    if (VALUES) {
      codes = step[vecinfer::value_offset(CHUNKS, token, m) / 4];
    } else {
      const int first = vecinfer::key_offset(CHUNKS, token, m);
      const int other = vecinfer::key_offset(CHUNKS, token + 2, m);
      codes = ((step[first / 4] >> (8 * (first % 4))) & 0xffffu) |
              (((step[other / 4] >> (8 * (other % 4))) & 0xffffu) << 16);
    }
    piece = table + (TABLES == 1 ? 0 : m * C * SUB_);
  }
  void token(uint i) {
    const uint32_t code = (codes >> (8u * i)) & 255u;
    entry = piece + (int)(C == 256 ? code : min(code, (uint32_t)(C - 1))) * SUB_;
  }
  float value(int j) const { return (float)entry[j]; }
  float factor(int) const { return 1.0f; }
};

}  // namespace veloxquant
