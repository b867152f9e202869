// Codes of 1 to 4 bits in dense streams, least significant bits first -> bytes for look-ups: those
// of 8, 4, 2 and 2 dimensions are one byte of 8, 8, 6 and 8 bits, the first dimension lowest.
// Compiled once per SIMD level.
#pragma once

#include <cstdint>

namespace veloxquant::lookup {

// Streams by dimension, [head_dim][64 codes] -> rows [head_dim / n][64]. Up to 2 bytes beyond the
// last stream are read (3 bits).
void join_columns(const uint8_t* streams, int head_dim, int bits, uint8_t* rows);

// Streams by token, [64][head_dim codes] -> rows [head_dim / n][64].
void join_tokens(const uint8_t* streams, int head_dim, int bits, uint8_t* rows);

// Codes of 4 bits where byte k of 32 holds tokens k and k + 32: two rows of them are one of 64
// bytes.
void join_folded(const uint8_t* folded, int n_rows, uint8_t* rows);

}  // namespace veloxquant::lookup
