// Sums over a row in an order that every vector width can keep: 16 partial sums, partial[i % 16]
// takes element i, ascending; then partial[j] += partial[j + 8], + 4, + 2, + 1.
#pragma once

#include "src/math/portable.h"

namespace veloxquant {

constexpr int kRowLanes = 16;

VQ_FN float fold_row_lanes(float* partial) {
  for (int half = kRowLanes / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) partial[j] = partial[j] + partial[j + half];
  }
  return partial[0];
}

// sum_i a_i b_i
VQ_FN float dot_row(const float* a, const float* b, int n) {
  float partial[kRowLanes] = {0.0f};
  for (int i = 0; i < n; ++i) {
    partial[i % kRowLanes] = partial[i % kRowLanes] + mul(a[i], b[i]);
  }
  return fold_row_lanes(partial);
}

}  // namespace veloxquant
