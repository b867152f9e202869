// Codes of few bits, each of one dimension, joined to bytes for look-ups: eight of 1 bit, four of
// 2, two of 3 or 4 bits are one code of byte_codes.h.
#pragma once

#include <cstdint>
#include <vector>

#include "src/codecs/lookup/byte_codes.h"

namespace veloxquant::lookup {

// Dimensions that share a byte; divides any head_dim (a multiple of 8). bits: 1..8.
int dimensions_a_byte(int bits);

// A code c of a dimension stands for levels[c], 2^bits of them, the same for all dimensions; one
// list for each part (ByteCodes::n_parts). Without `rows` and `factors`, which are the codec's.
ByteCodes scalar_codes(int head_dim, int bits, const std::vector<std::vector<float>>& levels,
                       int64_t block_bytes);

// What `rows` writes (for streams of codes: stream_kernels.h)
// from bit planes [head_dim][bits][8 bytes], bit t of the 8 bytes is token t.
void join_planes(const uint8_t* planes, int head_dim, int bits, uint8_t* rows);

}  // namespace veloxquant::lookup
