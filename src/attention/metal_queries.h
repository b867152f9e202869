// Queries through a codec's matrix before decode attention on Metal: q_codes of metal_decode.h.
#pragma once

#include "src/math/finite.h"

namespace veloxquant {

// to[row][j] = sum_i q[row][i] matrix[i][j] of one KV head. thread: (j, query, query head of a
// batch). group: query heads of a KV head; matrices: 1 or one a KV head.
template <int DIM, class Q, class Matrix, class To>
VQ_FN void turn_query(Q q, Matrix matrix, int matrices, int kv_heads, int group, To to, uint3 at,
                      uint3 size) {
  const int64_t row = (int64_t)at.z * size.y + at.y;
  const int head = matrices == 1 ? 0 : (int)at.z / group % kv_heads;
  float sum = 0.0f;
  for (int i = 0; i < DIM; ++i) {
    sum = fma(finite_or_nan((float)q[row * DIM + i]),
              (float)matrix[((int64_t)head * DIM + i) * size.x + at.x], sum);
  }
  to[row * size.x + at.x] = sum;
}

}  // namespace veloxquant
