// Sums over a row in an order that every vector width can keep: 16 partial sums, partial[i % 16]
// takes element i, ascending; then partial[j] += partial[j + 8], + 4, + 2, + 1.
#pragma once

#include "src/math/portable.h"

namespace veloxquant {

VQ_CONSTANT int kRowLanes = 16;

template <class Partial>
VQ_FN float fold_row_lanes(Partial partial) {
  for (int width = kRowLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) partial[j] = partial[j] + partial[j + width];
  }
  return partial[0];
}

// sum_i a_i b_i
template <class A, class B>
VQ_FN float dot_row(A a, B b, int n) {
  float partial[kRowLanes] = {0.0f};
  for (int i = 0; i < n; ++i) {
    partial[i % kRowLanes] = partial[i % kRowLanes] + mul(a[i], b[i]);
  }
  return fold_row_lanes(partial);
}

}  // namespace veloxquant
