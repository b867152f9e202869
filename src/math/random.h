// SplitMix64 (Steele, Lea, Flood 2014). Not <random>: its distributions differ between standard
// libraries, and a codebook or a rotation must not depend on the compiler that built the program.
#pragma once

#include <cstdint>

namespace veloxquant {

class SplitMix64 {
 public:
  // Streams of one seed are independent: one per k-means problem, so that the order in which
  // threads take the problems does not matter.
  SplitMix64(uint64_t seed, uint64_t stream) : state_(seed) {
    // Hashed after the stream is added: streams would be shifted copies of each other otherwise.
    state_ = next() + stream;
    state_ = next();
  }

  uint64_t next() {
    uint64_t z = (state_ += kStep);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }

  // In [0, 1), 53 bits.
  double uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }

  // In [0, n).
  int64_t index(int64_t n) {
    // The product rounds up to n only from n = 2^53 on.
    return static_cast<int64_t>(uniform() * static_cast<double>(n));
  }

 private:
  static constexpr uint64_t kStep = 0x9e3779b97f4a7c15ull;
  uint64_t state_;
};

}  // namespace veloxquant
