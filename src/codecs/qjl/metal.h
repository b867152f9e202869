// QJL's functions on Metal: signs of a given sketch, and the inner product by tables of bytes, as
// src/codecs/qjl/functions.cpp has them: the same sums in the same order.
#pragma once

#include "src/codecs/metal_rows.h"
#include "src/math/square_root.h"

namespace veloxquant {

// |row| of DIM values, one sum in ascending order.
template <int DIM, class Row>
VQ_FN float sketch_norm(Row row) {
  float sum = 0.0f;
  for (int d = 0; d < DIM; ++d) sum = sum + mul(row[d], row[d]);
  return square_root(sum);
}

// <row of the sketch, x>, ascending.
template <int DIM, class Matrix, class Row>
VQ_FN float sketch_product(Matrix matrix, Row x) {
  float sum = mul(matrix[0], x[0]);
  for (int i = 1; i < DIM; ++i) sum = sum + mul(matrix[i], x[i]);
  return sum;
}

// x [n_rows][DIM] -> signs [n_rows][n_signs / 8], norms [n_rows]. bits: [ROWS][n_threads]. tile:
// which rows.
template <int DIM, int ROWS, class X, class Sketch, class Signs, class Norms, class Rows,
          class Bits>
VQ_FN void qjl_encode_rows(X x, int n_rows, Sketch sketch, int n_signs, Signs signs, Norms norms,
                           Rows rows, Bits bits, uint tile, uint self, uint n_threads) {
  const int first = (int)tile * ROWS, present = min(ROWS, n_rows - first);
  load_tile<DIM, ROWS>(x, first, n_rows, rows, self, n_threads);
  for (uint i = self; i < ROWS * DIM; i += n_threads) rows[i] = finite_or_clamped(rows[i]);
  barrier_of_group();
  for (int r = (int)self; r < present; r += (int)n_threads) {
    norms[first + r] = finite_half(sketch_norm<DIM>(rows + r * DIM));
  }
  for (int begin = 0; begin < n_signs; begin += (int)n_threads) {
    const int j = begin + (int)self, here = min((int)n_threads, n_signs - begin);
    for (int r = 0; r < present && j < n_signs; ++r) {
      const float y = sketch_product<DIM>(sketch + (int64_t)j * DIM, rows + r * DIM);
      bits[r * (int)n_threads + (int)self] = y >= 0.0f ? 1 : 0;
    }
    barrier_of_group();
    for (int i = (int)self; i < present * (here / 8); i += (int)n_threads) {
      const int r = i / (here / 8), byte = i % (here / 8);
      uint32_t field = 0u;
      for (int k = 0; k < 8; ++k) field |= (uint32_t)bits[r * (int)n_threads + byte * 8 + k] << k;
      signs[(int64_t)(first + r) * (n_signs / 8) + begin / 8 + byte] = (uint8_t)field;
    }
    barrier_of_group();
  }
}

// Sums of +-q under every byte of signs: the value of `pattern` for eight queries.
template <class Q>
VQ_FN float signed_sum(Q q, uint pattern) {
  float sum = -q[0];
  for (int j = 1; j < 8; ++j) sum = sum - q[j];
  for (int j = 7; j >= 0; --j) {
    if ((pattern >> j) & 1u) sum = sum + mul(2.0f, q[j]);
  }
  return sum;
}

// q [batches][q_heads][m], signs [batches][n_keys][heads][m / 8], norms likewise -> scores
// [batches][q_heads][n_keys]. A threadgroup of 256 takes as many keys of one query head. table:
// [16][256]. group: (tile of keys, query head, batch).
template <class Q, class Signs, class Norms, class Scores, class Table>
VQ_FN void qjl_scores(Q q, int m, int q_heads, int heads, Signs signs, Norms norms, int n_keys,
                      float constant_factor, Scores scores, Table table, uint3 group, uint self) {
  const int64_t row = (int64_t)group.z * q_heads + group.y;
  const int key = (int)(group.x * 256 + self), head = (int)group.y / (q_heads / heads);
  const int64_t at = ((int64_t)group.z * n_keys + min(key, n_keys - 1)) * heads + head;
  float sum = 0.0f;
  for (int first = 0; first < m / 8; first += 16) {
    const int here = min(16, m / 8 - first);
    barrier_of_group();
    for (int b = 0; b < here; ++b) {
      table[b * 256 + (int)self] = signed_sum(q + row * m + 8 * (first + b), self);
    }
    barrier_of_group();
    for (int b = 0; b < here; ++b) sum = sum + table[b * 256 + signs[at * (m / 8) + first + b]];
  }
  if (key < n_keys) {
    scores[row * n_keys + key] = finite_half(mul(mul(constant_factor, norms[at]), sum));
  }
}

}  // namespace veloxquant
