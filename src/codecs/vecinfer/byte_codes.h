// VecInfer's codes as bytes, for attention on codes (src/codecs/lookup).
#pragma once

#include "src/codecs/lookup/byte_codes.h"
#include "src/codecs/vecinfer/format.h"

namespace veloxquant::vecinfer {

// Tables of more than 256 entries have no such form.
inline bool has_byte_codes(const HeadTables& head) { return head.bits <= 8; }

// 8 bits: the rows of the block. 6 bits: expanded. 4 bits: those of two neighbouring sub-vectors
// together where there is an even number of them, which halves the look-ups.
lookup::ByteCodes byte_codes(const HeadTables& head);

}  // namespace veloxquant::vecinfer
