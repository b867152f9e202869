// Codes packed into 32-bit words, as the Python functions expose them: floor(32 / bits) codes a
// word, least significant bits first, every row padded with zero bits to whole words. (Caches and
// files use a dense stream of bytes instead: src/math/bitpack.h.)
#pragma once

#include <cstdint>

#include "veloxquant/backend.h"

namespace veloxquant {

// bits: 1..8
inline int codes_per_word(int bits) { return 32 / bits; }
inline int64_t words_per_row(int64_t n_codes, int bits) {
  return (n_codes + codes_per_word(bits) - 1) / codes_per_word(bits);
}

// codes: [rows][n]; each is masked to `bits` bits. words: [rows][words_per_row(n, bits)].
void pack_words(Backend backend, const int32_t* codes, int64_t rows, int64_t n, int bits,
                uint32_t* words);
void pack_words(Backend backend, const uint8_t* codes, int64_t rows, int64_t n, int bits,
                uint32_t* words);

// The first n codes of each row of `row_words` words.
void unpack_words(Backend backend, const uint32_t* words, int64_t rows, int64_t row_words,
                  int64_t n, int bits, int32_t* codes);
void unpack_words(Backend backend, const uint32_t* words, int64_t rows, int64_t row_words,
                  int64_t n, int bits, uint8_t* codes);

}  // namespace veloxquant
