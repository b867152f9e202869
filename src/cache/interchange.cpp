#include "veloxquant/interchange.h"

#include <algorithm>

namespace veloxquant {
namespace {

// visit(block index, first token, tokens in the block)
template <class Visit>
void for_each_block(int64_t n_tokens, const Visit& visit) {
  for (int64_t first = 0; first < n_tokens; first += kBlockTokens) {
    const int n = static_cast<int>(std::min<int64_t>(kBlockTokens, n_tokens - first));
    visit(first / kBlockTokens, first, n);
  }
}

}  // namespace

void to_interchange(const Codec& codec, const uint8_t* blocks, int64_t n_tokens, uint8_t* rows) {
  for_each_block(n_tokens, [&](int64_t i, int64_t first, int n) {
    codec.unpack_tokens(blocks + i * codec.block_bytes(), n, rows + first * codec.token_bytes());
  });
}

void from_interchange(const Codec& codec, const uint8_t* rows, int64_t n_tokens, uint8_t* blocks) {
  for_each_block(n_tokens, [&](int64_t i, int64_t first, int n) {
    codec.pack_tokens(rows + first * codec.token_bytes(), n, blocks + i * codec.block_bytes());
  });
}

}  // namespace veloxquant
