// Packed codes of VecInfer on Metal: four tokens' codes of one sub-vector by 32-bit loads, in any
// of the widths of format.h (planes of 8, 4 and 2 bits).
#pragma once

#include "src/math/portable.h"

namespace veloxquant {

VQ_FN int vecinfer_row_words(int bits) { return 2 * bits; }  // 64 codes

// Codes of tokens 4 w .. 4 w + 3 of a row of 64, one in each byte of the two results: the low 8
// bits, and what is above them. Every lane asks for its own w in 0..15.
template <int BITS, class Row>
VQ_FN uint32_t vecinfer_low_codes(Row row, uint32_t w) {
  if (BITS >= 8) return row[w];
  const uint32_t fields = (row[w % 8u] >> (4u * (w / 8u))) & 0x0f0f0f0fu;
  if (BITS == 4) return fields;
  return fields | (((row[8u + w % 4u] >> (2u * (w / 4u))) & 0x03030303u) << 4);
}
template <int BITS, class Row>
VQ_FN uint32_t vecinfer_high_codes(Row row, uint32_t w) {
  if (BITS == 10) return (row[16u + w % 4u] >> (2u * (w / 4u))) & 0x03030303u;
  if (BITS == 12) return (row[16u + w % 8u] >> (4u * (w / 8u))) & 0x0f0f0f0fu;
  return 0u;
}

// Code i of the four; beyond the last centroid counts as the last.
template <int BITS, int C>
VQ_FN uint32_t vecinfer_code(uint32_t low, uint32_t high, uint32_t i) {
  uint32_t code = (low >> (8u * i)) & 255u;
  if (BITS > 8) code |= ((high >> (8u * i)) & 255u) << 8;
  return C == (1 << BITS) ? code : min(code, (uint32_t)(C - 1));
}

}  // namespace veloxquant
