#include "veloxquant/interchange.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace veloxquant {
namespace {

int code_bits(const Codec& codec) {
  const int64_t codes = int64_t{kBlockTokens} * codec.codes_per_token();
  const int64_t bits = 8 * codec.block_bytes();
  require(bits % codes == 0 && bits / codes <= 16, "[interchange] codec: got ", codec.name(),
          " with blocks of ", codec.block_bytes(), " bytes, wanted blocks of ",
          codec.codes_per_token(), " codes a token and nothing else");
  return static_cast<int>(bits / codes);
}

}  // namespace

int64_t interchange_bytes(const Codec& codec) {
  return (int64_t{codec.codes_per_token()} * code_bits(codec) + 7) / 8;
}

void to_interchange(const Codec& codec, const uint8_t* blocks, int64_t n_tokens, uint8_t* rows) {
  const int bits = code_bits(codec), codes = codec.codes_per_token();
  const int64_t row_bytes = interchange_bytes(codec);
  std::vector<uint16_t> unpacked(static_cast<size_t>(kBlockTokens) * codes);
  for (int64_t first = 0; first < n_tokens; first += kBlockTokens) {
    const int n = static_cast<int>(std::min<int64_t>(kBlockTokens, n_tokens - first));
    codec.unpack_codes(blocks + first / kBlockTokens * codec.block_bytes(), n, unpacked.data());
    for (int t = 0; t < n; ++t) {
      uint8_t* row = rows + (first + t) * row_bytes;
      std::memset(row, 0, row_bytes);
      for (int m = 0; m < codes; ++m) {
        const uint32_t code = unpacked[static_cast<size_t>(t) * codes + m];
        const int64_t bit = int64_t{m} * bits;
        for (int done = 0; done < bits;) {  // a code may cross bytes
          const int shift = static_cast<int>((bit + done) % 8);
          row[(bit + done) / 8] |= static_cast<uint8_t>((code >> done) << shift);
          done += 8 - shift;
        }
      }
    }
  }
}

void from_interchange(const Codec& codec, const uint8_t* rows, int64_t n_tokens, uint8_t* blocks) {
  const int bits = code_bits(codec), codes = codec.codes_per_token();
  const int64_t row_bytes = interchange_bytes(codec);
  const uint32_t mask = (1u << bits) - 1u;
  std::vector<uint16_t> unpacked(static_cast<size_t>(kBlockTokens) * codes);
  for (int64_t first = 0; first < n_tokens; first += kBlockTokens) {
    const int n = static_cast<int>(std::min<int64_t>(kBlockTokens, n_tokens - first));
    for (int t = 0; t < n; ++t) {
      const uint8_t* row = rows + (first + t) * row_bytes;
      for (int m = 0; m < codes; ++m) {
        const int64_t bit = int64_t{m} * bits;
        uint32_t code = 0;
        for (int done = 0; done < bits;) {
          const int shift = static_cast<int>((bit + done) % 8);
          code |= (uint32_t{row[(bit + done) / 8]} >> shift) << done;
          done += 8 - shift;
        }
        unpacked[static_cast<size_t>(t) * codes + m] = static_cast<uint16_t>(code & mask);
      }
    }
    codec.pack_codes(unpacked.data(), n, blocks + first / kBlockTokens * codec.block_bytes());
  }
}

}  // namespace veloxquant
