#include "src/codecs/lookup/scalar_codes.h"

#include <algorithm>
#include <cstring>

#include "src/codecs/lookup/byte_kernels.h"

namespace veloxquant::lookup {
int dimensions_a_byte(int bits) { return bits == 1 ? 8 : bits == 2 ? 4 : bits <= 4 ? 2 : 1; }

ByteCodes scalar_codes(int head_dim, int bits, const std::vector<float>& levels,
                       int64_t block_bytes) {
  const int n = dimensions_a_byte(bits);
  ByteCodes codes;
  codes.n_codes = head_dim / n;
  codes.sub_dim = n;
  codes.n_digits = n;
  codes.digit_bits = bits;
  codes.block_bytes = block_bytes;
  codes.shared_table = true;
  codes.table = [n, levels](int, float* to) {
    for (int i = 0; i < n; ++i) to = std::copy(levels.begin(), levels.end(), to);
  };
  return codes;
}

void join_codes(const uint8_t* codes, int head_dim, int bits, uint8_t* rows) {
  const int n = dimensions_a_byte(bits);
  for (int m = 0; m < head_dim / n; ++m, rows += kBlockTokens) {
    std::memcpy(rows, codes, kBlockTokens);
    codes += kBlockTokens;
    for (int i = 1; i < n; ++i, codes += kBlockTokens) {
      for (int t = 0; t < kBlockTokens; ++t) {
        rows[t] = static_cast<uint8_t>(rows[t] | (codes[t] << (i * bits)));
      }
    }
  }
}

void join_planes(const uint8_t* planes, int head_dim, int bits, uint8_t* rows) {
  const int n = dimensions_a_byte(bits);
  spread_planes(planes, head_dim / n, n * bits, rows);
}

}  // namespace veloxquant::lookup
