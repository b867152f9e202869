#include "src/codecs/rabitq/byte_codes.h"

#include <vector>

#include "src/codecs/lookup/scalar_codes.h"

namespace veloxquant::rabitq {

lookup::ByteCodes byte_codes(int rows, int bits, int64_t block_bytes) {
  const int highest = (1 << bits) - 1;
  std::vector<float> levels;
  for (int u = 0; u <= highest; ++u) levels.push_back(static_cast<float>(2 * u - highest));
  lookup::ByteCodes codes = lookup::scalar_codes(rows, bits, {levels}, block_bytes);
  codes.rows = [rows, bits](const uint8_t* block, uint8_t* to) {
    lookup::join_planes(block, rows, bits, to);
  };
  return codes;
}

}  // namespace veloxquant::rabitq
