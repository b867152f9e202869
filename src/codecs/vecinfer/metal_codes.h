// Packed codes of VecInfer on Metal: four tokens' codes of one sub-vector by 32-bit loads, in any
// of the widths of format.h (planes of 8, 4 and 2 bits).
#pragma once

#include "src/math/portable.h"

namespace veloxquant {

VQ_FN int vecinfer_row_words(int bits) { return 2 * bits; }  // 64 codes

// The word of a plane of four bits, and of two, that tokens 4 w .. 4 w + 3 have fields in; 0 where
// a row has no such plane.
template <int BITS, class Row>
VQ_FN uint32_t vecinfer_fours(Row row, uint32_t w) {
  if (BITS == 8 || BITS == 10) return 0u;
  return row[(BITS == 12 ? 16u : 0u) + w % 8u];
}
template <int BITS, class Row>
VQ_FN uint32_t vecinfer_twos(Row row, uint32_t w) {
  if (BITS != 6 && BITS != 10) return 0u;
  return row[(BITS == 6 ? 8u : 16u) + w % 4u];
}

// Codes of tokens 4 w .. 4 w + 3 of a row of 64 from these words, one in each byte of the two
// results: the low 8 bits, and what is above them. Every lane asks for its own w in 0..15.
template <int BITS, class Row>
VQ_FN uint32_t vecinfer_low_codes(Row row, uint32_t fours, uint32_t twos, uint32_t w) {
  if (BITS >= 8) return row[w];
  const uint32_t fields = (fours >> (4u * (w / 8u))) & 0x0f0f0f0fu;
  if (BITS == 4) return fields;
  return fields | (((twos >> (2u * (w / 4u))) & 0x03030303u) << 4);
}
template <int BITS>
VQ_FN uint32_t vecinfer_high_codes(uint32_t fours, uint32_t twos, uint32_t w) {
  if (BITS == 10) return (twos >> (2u * (w / 4u))) & 0x03030303u;
  if (BITS == 12) return (fours >> (4u * (w / 8u))) & 0x0f0f0f0fu;
  return 0u;
}
template <int BITS, class Row>
VQ_FN uint32_t vecinfer_low_codes(Row row, uint32_t w) {
  return vecinfer_low_codes<BITS>(row, vecinfer_fours<BITS>(row, w), vecinfer_twos<BITS>(row, w),
                                  w);
}
template <int BITS, class Row>
VQ_FN uint32_t vecinfer_high_codes(Row row, uint32_t w) {
  return vecinfer_high_codes<BITS>(vecinfer_fours<BITS>(row, w), vecinfer_twos<BITS>(row, w), w);
}

// Code i of the four; beyond the last centroid counts as the last.
template <int BITS, int C>
VQ_FN uint32_t vecinfer_code(uint32_t low, uint32_t high, uint32_t i) {
  uint32_t code = (low >> (8u * i)) & 255u;
  if (BITS > 8) code |= ((high >> (8u * i)) & 255u) << 8;
  return C == (1 << BITS) ? code : min(code, (uint32_t)(C - 1));
}

}  // namespace veloxquant
