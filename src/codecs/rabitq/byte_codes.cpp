#include "src/codecs/rabitq/byte_codes.h"

#include <cstring>

namespace veloxquant::rabitq {
namespace {

int rows_of_a_byte(int bits) { return bits == 3 ? 2 : 8 / bits; }

// Bit k of byte t <- bit t of plane k, for 64 tokens and up to 8 planes.
void gather_bits(const uint8_t* planes, int n_planes, uint8_t* bytes) {
  for (int eighth = 0; eighth < kPlaneBytes; ++eighth) {
    uint64_t square = 0;
    for (int k = 0; k < n_planes; ++k) {
      square |= static_cast<uint64_t>(planes[k * kPlaneBytes + eighth]) << (8 * k);
    }
    square = transpose_bits(square);
    for (int t = 0; t < 8; ++t, square >>= 8) {
      bytes[8 * eighth + t] = static_cast<uint8_t>(square);
    }
  }
}

}  // namespace

lookup::ByteCodes byte_codes(int rows, int bits, int64_t block_bytes) {
  lookup::ByteCodes codes;
  codes.sub_dim = rows_of_a_byte(bits);
  codes.n_codes = rows / codes.sub_dim;
  codes.n_values = 1 << (bits * codes.sub_dim);
  codes.block_bytes = block_bytes;
  codes.shared_table = true;
  codes.table = [bits, sub_dim = codes.sub_dim, n = codes.n_values](int, float* to) {
    const int highest = (1 << bits) - 1;
    for (int value = 0; value < n; ++value) {
      for (int i = 0; i < sub_dim; ++i) {
        *to++ = static_cast<float>(2 * ((value >> (i * bits)) & highest) - highest);
      }
    }
  };
  codes.rows = [n = codes.n_codes, n_planes = bits * codes.sub_dim](const uint8_t* block,
                                                                    uint8_t* to) {
    for (int m = 0; m < n; ++m, block += n_planes * kPlaneBytes, to += kBlockTokens) {
      gather_bits(block, n_planes, to);
    }
  };
  return codes;
}

}  // namespace veloxquant::rabitq
