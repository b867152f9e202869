// Nearest centroid by direct squared distance.
#pragma once

#include "src/math/portable.h"

namespace veloxquant {

// sum_i (x_i - c_i)^2, ascending i. x_i is x[i * x_stride].
template <class X, class Table>
VQ_FN float squared_distance(X x, int64_t x_stride, Table centroid, int sub_dim) {
  float sum = 0.0f;
  for (int i = 0; i < sub_dim; ++i) {
    float difference = x[i * x_stride] - centroid[i];
    float square = mul(difference, difference);
    sum = i == 0 ? square : sum + square;
  }
  return sum;
}

// Centroids first, first + 1, ... of a table against the best of those before them. The lowest
// index wins ties; a NaN distance never wins.
template <class X, class Table>
VQ_FN void nearest_of(X x, int64_t x_stride, Table table, uint32_t first, int n_centroids,
                      int sub_dim, VQ_THREAD uint32_t* best, VQ_THREAD float* distance) {
  for (int c = 0; c < n_centroids; ++c) {
    float d = squared_distance(x, x_stride, table + (int64_t)c * sub_dim, sub_dim);
    if (d < *distance) {
      *distance = d;
      *best = first + (uint32_t)c;
    }
  }
}

template <class X, class Table>
VQ_FN uint32_t nearest_centroid(X x, int64_t x_stride, Table table, int n_centroids, int sub_dim,
                                VQ_THREAD float* best_distance) {
  uint32_t best = 0;
  *best_distance = float_of(0x7f800000u);
  nearest_of(x, x_stride, table, 0u, n_centroids, sub_dim, &best, best_distance);
  return best;
}

}  // namespace veloxquant
