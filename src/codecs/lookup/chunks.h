// What the look-up kernels of a codec's codes share: blocks in chunks that stay in the caches.
#pragma once

#include <algorithm>

#include "src/codecs/lookup/buffer.h"
#include "src/codecs/lookup/byte_codes.h"
#include "src/codecs/lookup/byte_kernels.h"

namespace veloxquant::lookup {

// Calls body(chunk of at most `most` blocks, index of its first token, factors of its tokens or
// null).
template <class Body>
void for_each_chunk(const ByteCodes& codes, const uint8_t* blocks, int n_blocks, int most,
                    const Body& body) {
  most = std::min(n_blocks, most);
  const int64_t row_bytes = int64_t{codes.n_codes} * kBlockTokens;
  Buffer factors, rows;
  if (codes.factors) factors = take_buffer(int64_t{most} * kBlockTokens);
  if (codes.rows) rows = take_buffer(most * row_bytes / static_cast<int64_t>(sizeof(float)));
  for (int done = 0; done < n_blocks; done += most) {
    const uint8_t* first = blocks + done * codes.block_bytes;
    Blocks chunk;
    chunk.data = first;
    chunk.stride = codes.block_bytes;
    chunk.n = std::min(most, n_blocks - done);
    chunk.n_codes = codes.n_codes;
    chunk.n_values = codes.n_values();
    if (codes.rows) {
      uint8_t* to = reinterpret_cast<uint8_t*>(rows.get());
      for (int b = 0; b < chunk.n; ++b) {
        codes.rows(first + b * codes.block_bytes, to + b * row_bytes);
      }
      chunk.data = to;
      chunk.stride = row_bytes;
    }
    for (int b = 0; codes.factors && b < chunk.n; ++b) {
      codes.factors(first + b * codes.block_bytes, factors.get() + b * kBlockTokens);
    }
    body(chunk, int64_t{done} * kBlockTokens, factors.get());
  }
}

}  // namespace veloxquant::lookup
