// The seeded rotation y = H D2 P H D1 x of the calibration-free codecs (src/math/rotation.h).
#pragma once

#include <cstdint>
#include <vector>

#include "veloxquant/backend.h"

namespace veloxquant {

class Rotation {
 public:
  // Signs: SplitMix64 of `seed`, stream 0 for D1 and 1 for D2; coordinate i takes the top bit of
  // the i-th number, 1 for +1. Orthonormal; the same on every machine.
  Rotation(int head_dim, uint64_t seed);

  int head_dim() const { return dim_; }
  // +1 or -1, [2][head_dim]
  const float* signs() const { return signs_.data(); }

  // In place on n rows of fp32 [n][head_dim]. Equal on every backend and SIMD level.
  void forward(Backend backend, float* rows, int64_t n) const;
  void inverse(Backend backend, float* rows, int64_t n) const;

 private:
  int dim_;
  std::vector<float> signs_;
};

// Orthonormal (block) Walsh-Hadamard transform of n rows, in place (src/math/hadamard.h).
void hadamard_rows(Backend backend, int head_dim, float* rows, int64_t n);

}  // namespace veloxquant
