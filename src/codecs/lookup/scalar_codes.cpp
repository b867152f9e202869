#include "src/codecs/lookup/scalar_codes.h"

#include <algorithm>

#include "src/codecs/lookup/byte_kernels.h"

namespace veloxquant::lookup {
int dimensions_a_byte(int bits) { return bits == 1 ? 8 : bits == 2 ? 4 : bits <= 4 ? 2 : 1; }

ByteCodes scalar_codes(int head_dim, int bits, const std::vector<std::vector<float>>& levels,
                       int64_t block_bytes) {
  const int n = dimensions_a_byte(bits);
  // Dimensions that make a digit of up to 4 bits: fewer look-ups of keys, in tables of 16.
  const int dim = bits == 1 ? 4 : bits == 2 ? 2 : 1;
  ByteCodes codes;
  codes.n_parts = static_cast<int>(levels.size());
  codes.n_codes = codes.n_parts * (head_dim / n);
  codes.sub_dim = n;
  codes.n_digits = n / dim;
  codes.digit_bits = bits * dim;
  codes.block_bytes = block_bytes;
  codes.shared_table = true;
  codes.table = [=, n_digits = n / dim, a_part = head_dim / n](int m, float* to) {
    const std::vector<float>& part = levels[m / a_part];
    const int n_values = 1 << (bits * dim), mask = (1 << bits) - 1;
    for (int i = 0; i < n_digits; ++i) {
      for (int v = 0; v < n_values; ++v) {
        for (int d = 0; d < dim; ++d) *to++ = part[v >> d * bits & mask];
      }
    }
  };
  return codes;
}

void join_planes(const uint8_t* planes, int head_dim, int bits, uint8_t* rows) {
  const int n = dimensions_a_byte(bits);
  spread_planes(planes, head_dim / n, n * bits, rows);
}

}  // namespace veloxquant::lookup
