// Codes in 32-bit words (veloxquant/words.h) on Metal: a thread a word, or a code.
#pragma once

#include "src/math/portable.h"

namespace veloxquant {

// thread: (word of a row, row)
template <int BITS, class Codes, class Words>
VQ_FN void pack_words(Codes codes, int n_codes, int row_words, Words words, uint3 at) {
  const int per_word = 32 / BITS, first = (int)at.x * per_word;
  uint32_t word = 0u;
  for (int k = 0; k < per_word && first + k < n_codes; ++k) {
    const uint32_t code = (uint32_t)codes[(int64_t)at.y * n_codes + first + k];
    word |= (code & ((1u << BITS) - 1u)) << (k * BITS);
  }
  words[(int64_t)at.y * row_words + at.x] = word;
}

// thread: (code of a row, row)
template <int BITS, class Words, class Codes>
VQ_FN void unpack_words(Words words, int row_words, Codes codes, int n_codes, uint3 at) {
  const uint32_t per_word = 32u / BITS;
  const uint32_t word = words[(int64_t)at.y * row_words + at.x / per_word];
  codes[(int64_t)at.y * n_codes + at.x] =
      (int)((word >> (at.x % per_word * BITS)) & ((1u << BITS) - 1u));
}

}  // namespace veloxquant
