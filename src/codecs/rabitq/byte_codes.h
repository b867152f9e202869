// Bit planes as the bytes that look-ups work on (src/codecs/lookup).
#pragma once

#include "src/codecs/lookup/byte_codes.h"
#include "src/codecs/rabitq/levels.h"

namespace veloxquant::rabitq {

// Planes at the start of a block, `rows` rows of `bits` bits: 8, 4, 2 or 2 rows are one byte for 1
// to 4 bits. rows must be a multiple of that. Without factors.
lookup::ByteCodes byte_codes(int rows, int bits, int64_t block_bytes);

}  // namespace veloxquant::rabitq
