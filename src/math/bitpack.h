// Codes as a dense stream of bits, least significant bits first: code i takes the bits
// [i * n_bits, (i + 1) * n_bits) of the bytes. This is the order of files and of the Python
// functions.
#pragma once

#include "src/math/portable.h"

namespace veloxquant {

VQ_FN int64_t packed_bytes(int64_t n, int n_bits) { return (n * n_bits + 7) / 8; }

// bytes: packed_bytes(n, n_bits), all of them written; 1 <= n_bits <= 16. Codes are masked.
VQ_FN void pack_bits(const uint16_t* codes, int64_t n, int n_bits, uint8_t* bytes) {
  const uint32_t mask = (1u << n_bits) - 1u;
  uint64_t held = 0;
  int n_held = 0;
  for (int64_t i = 0; i < n; ++i) {
    held |= (uint64_t)(codes[i] & mask) << n_held;
    for (n_held += n_bits; n_held >= 8; n_held -= 8, held >>= 8) *bytes++ = (uint8_t)held;
  }
  if (n_held > 0) *bytes = (uint8_t)held;
}

VQ_FN void unpack_bits(const uint8_t* bytes, int64_t n, int n_bits, uint16_t* codes) {
  const uint32_t mask = (1u << n_bits) - 1u;
  uint64_t held = 0;
  int n_held = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (; n_held < n_bits; n_held += 8) held |= (uint64_t)*bytes++ << n_held;
    codes[i] = (uint16_t)(held & mask);
    held >>= n_bits;
    n_held -= n_bits;
  }
}

}  // namespace veloxquant
