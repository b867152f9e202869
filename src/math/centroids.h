// Nearest centroid by direct squared distance.
#pragma once

#include "src/math/portable.h"

namespace veloxquant {

// sum_i (x_i - c_i)^2, ascending i. x_i is x[i * x_stride].
VQ_FN float squared_distance(const float* x, int64_t x_stride, const float* centroid, int sub_dim) {
  float sum = 0.0f;
  for (int i = 0; i < sub_dim; ++i) {
    float difference = x[i * x_stride] - centroid[i];
    float square = mul(difference, difference);
    sum = i == 0 ? square : sum + square;
  }
  return sum;
}

// The lowest index wins ties; a NaN distance never wins.
VQ_FN uint32_t nearest_centroid(const float* x, int64_t x_stride, const float* table,
                                int n_centroids, int sub_dim, float* best_distance) {
  uint32_t best = 0;
  float distance = float_of(0x7f800000u);
  for (int c = 0; c < n_centroids; ++c) {
    float d = squared_distance(x, x_stride, table + (int64_t)c * sub_dim, sub_dim);
    if (d < distance) {
      distance = d;
      best = (uint32_t)c;
    }
  }
  *best_distance = distance;
  return best;
}

}  // namespace veloxquant
