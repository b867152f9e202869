// The orthonormal Walsh-Hadamard transform, natural (Sylvester) order, in blocks.
//
// head_dim need not be a power of two: it is cut into descending powers of two
// (80 = 64 + 16, 96 = 64 + 32, 112 = 64 + 32 + 16), each transformed by itself.
//
// The order is part of the format: strides 1, 2, 4, ...; (a, b) -> (a + b, a - b); then one
// multiplication by hadamard_scale(block). Any radix or vector width that keeps this order gives
// the same bits.
#pragma once

#include "src/math/portable.h"

namespace veloxquant {

// Size of the Hadamard block that starts where `remaining` dimensions are left.
VQ_FN int hadamard_block(int remaining) {
  int block = 1;
  while (block * 2 <= remaining) block *= 2;
  return block;
}

// 1/sqrt(block), correctly rounded.
VQ_FN float hadamard_scale(int block) {
  float scale = 1.0f;
  while (block >= 4) {
    scale = mul(scale, 0.5f);
    block /= 4;
  }
  return block == 2 ? mul(scale, 0.70710678118654752440f) : scale;
}

// In place on one row of head_dim values.
template <class Row>
VQ_FN void hadamard_row(Row x, int head_dim) {
  int start = 0;
  while (start < head_dim) {
    int block = hadamard_block(head_dim - start);
    Row y = x + start;
    for (int stride = 1; stride < block; stride *= 2) {
      for (int i = 0; i < block; i += 2 * stride) {
        for (int j = i; j < i + stride; ++j) {
          float a = y[j];
          float b = y[j + stride];
          y[j] = a + b;
          y[j + stride] = a - b;
        }
      }
    }
    float scale = hadamard_scale(block);
    for (int j = 0; j < block; ++j) y[j] = mul(y[j], scale);
    start += block;
  }
}

}  // namespace veloxquant
