// Packed blocks in the order that files use, which no memory layout decides: token by token, the
// codes of a token one after the other, least significant bits first, a token in whole bytes.
#pragma once

#include "veloxquant/codec.h"

namespace veloxquant {

// Bytes of one token of one KV head. Throws Error for a codec whose blocks hold more than codes.
int64_t interchange_bytes(const Codec& codec);

// blocks: ceil(n_tokens / 64) blocks of one KV head; rows: n_tokens * interchange_bytes(codec).
void to_interchange(const Codec& codec, const uint8_t* blocks, int64_t n_tokens, uint8_t* rows);
// The tokens that the last block does not have are written as code 0.
void from_interchange(const Codec& codec, const uint8_t* rows, int64_t n_tokens, uint8_t* blocks);

}  // namespace veloxquant
