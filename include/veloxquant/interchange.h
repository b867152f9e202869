// Packed blocks in the order that files use, which no memory layout decides: token by token, as
// Codec::unpack_tokens writes them.
#pragma once

#include "veloxquant/codec.h"

namespace veloxquant {

// blocks: ceil(n_tokens / 64) blocks of one KV head; rows: n_tokens * codec.token_bytes().
void to_interchange(const Codec& codec, const uint8_t* blocks, int64_t n_tokens, uint8_t* rows);
// The tokens that the last block does not have are written as code 0.
void from_interchange(const Codec& codec, const uint8_t* rows, int64_t n_tokens, uint8_t* blocks);

}  // namespace veloxquant
