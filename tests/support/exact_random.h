// Seeded data whose bits are the same on every machine: integers and exact scalings only, no libm.
#pragma once

#include <vector>

#include "src/math/float16.h"

namespace veloxquant::test {

class ExactRandom {
 public:
  explicit ExactRandom(uint64_t seed) : state_(seed) {}

  uint64_t next() {  // splitmix64
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  int below(int n) { return static_cast<int>(next() % static_cast<uint64_t>(n)); }
  // The sum of four 16-bit integers, centred and scaled: bell-shaped, variance near 1.
  float value() {
    const uint64_t bits = next();
    int64_t sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<int64_t>((bits >> (16 * i)) & 0xffff);
    return static_cast<float>(sum - 2 * 65535) * 0x1p-15f;
  }
  std::vector<float> values(int64_t n) {
    std::vector<float> out(n);
    for (float& v : out) v = value();
    return out;
  }
  std::vector<uint16_t> halves(int64_t n) {
    std::vector<uint16_t> out(n);
    for (uint16_t& v : out) v = f32_to_f16(value());
    return out;
  }
  // A power of two times 1 to 1.5: smooth factors of very different sizes.
  float scale() {
    const int exponent = below(9) - 4;
    const float fraction = 1.0f + static_cast<float>(below(512)) * 0x1p-10f;
    return fraction * float_of(static_cast<uint32_t>(127 + exponent) << 23);
  }

 private:
  uint64_t state_;
};

}  // namespace veloxquant::test
