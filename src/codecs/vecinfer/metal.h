// VecInfer on Metal, the functions on rows: a threadgroup takes a tile of rows into its memory, its
// simdgroups share out the sub-vectors, and the lanes of one share out the centroids, so that a
// centroid is read once for all rows of the tile. Codes are those of src/math/centroids.h.
#pragma once

#include "src/codecs/metal_rows.h"
#include "src/math/centroids.h"

namespace veloxquant {

// Rows of DIM values -> codes[row * (DIM / SUB) + m]. rows: complete (a barrier before). table(m):
// tables + m * stride, C centroids of SUB values. ROWS is small: a lane keeps a distance for each,
// and the sub-vectors themselves where they are few numbers.
template <int DIM, int SUB, int C, int ROWS, class Rows, class Tables, class Codes>
VQ_FN void nearest_codes(Rows rows, Tables tables, int stride, Codes codes, uint simdgroup,
                         uint n_simdgroups, uint lane) {
  const bool held = ROWS * SUB <= 32;
  for (int m = (int)simdgroup; m < DIM / SUB; m += (int)n_simdgroups) {
    float own[ROWS * SUB <= 32 ? ROWS * SUB : 1];
    for (int i = 0; i < ROWS * SUB && held; ++i) own[i] = rows[i / SUB * DIM + m * SUB + i % SUB];
    uint32_t best[ROWS];
    float distance[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      best[r] = 0u;
      distance[r] = float_of(0x7f800000u);
    }
    for (int c = (int)lane; c < C; c += 32) {
      float centroid[SUB];
      for (int i = 0; i < SUB; ++i) centroid[i] = (float)tables[m * stride + c * SUB + i];
      for (int r = 0; r < ROWS; ++r) {
        if (held) {
          nearest_of(own + (held ? r * SUB : 0), 1, centroid, (uint32_t)c, 1, SUB, &best[r],
                     &distance[r]);
        } else {
          nearest_of(rows + (r * DIM + m * SUB), 1, centroid, (uint32_t)c, 1, SUB, &best[r],
                     &distance[r]);
        }
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      for (ushort width = 16; width > 0; width /= 2) {
        const float other = simd_shuffle_xor(distance[r], width);
        const uint32_t code = simd_shuffle_xor(best[r], width);
        if (other < distance[r] || (other == distance[r] && code < best[r])) {
          distance[r] = other;
          best[r] = code;
        }
      }
      if (lane == 0) codes[r * (DIM / SUB) + m] = best[r];
    }
  }
}

// x [planes][n_rows][DIM] -> codes int32. group: (tile, plane).
template <int DIM, int SUB, int C, int TABLES, int HEADS, int ROWS, class X, class Table,
          class Codes, class Rows, class Tile>
VQ_FN void vecinfer_quantize(X x, int n_rows, Table codebook, Codes codes, Rows rows, Tile tile,
                             uint3 group, uint self, uint n_threads) {
  const int M = DIM / SUB, first = (int)group.x * ROWS;
  const int64_t plane = group.y;
  load_tile<DIM, ROWS>(x + plane * n_rows * DIM, first, n_rows, rows, self, n_threads);
  barrier_of_group();
  const int table = C * SUB, head = (int)(plane % HEADS);
  nearest_codes<DIM, SUB, C, ROWS>(rows, codebook + (int64_t)head * TABLES * table,
                                   TABLES == 1 ? 0 : table, tile, self / 32, n_threads / 32,
                                   self % 32);
  barrier_of_group();
  for (uint i = self; i < (uint)(ROWS * M); i += n_threads) {
    const int row = first + (int)i / M;
    if (row < n_rows) codes[(plane * n_rows + row) * M + i % M] = (int)tile[i];
  }
}

// codes -> rows in the type of the codebook. thread: (element of a plane, plane).
template <int SUB, int C, int TABLES, int HEADS, class Codes, class Table, class Out>
VQ_FN void vecinfer_dequantize(Codes codes, int n_rows, int n_subvectors, Table codebook, Out out,
                               uint3 at) {
  const int64_t plane = at.y;
  const int m = (int)(at.x / SUB) % n_subvectors;
  const int64_t vector = plane * n_rows * n_subvectors + at.x / SUB;
  const uint32_t code = min((uint32_t)codes[vector], (uint32_t)(C - 1));
  const int64_t table = (int64_t)(plane % HEADS) * TABLES + (TABLES == 1 ? 0 : m);
  out[vector * SUB + at.x % SUB] = codebook[(table * C + code) * SUB + at.x % SUB];
}

// lut[row][m][c] = q_m . codebook[m][c], sums over ascending dimensions. thread: (c, row * M + m,
// plane).
template <int SUB, int C, int TABLES, int HEADS, class Q, class Table, class Lut>
VQ_FN void vecinfer_query_lut(Q q, int n_rows, int n_subvectors, Table codebook, Lut lut,
                              uint3 at) {
  const int64_t plane = at.z, vector = plane * n_rows * n_subvectors + at.y;
  const int64_t table =
      (int64_t)(plane % HEADS) * TABLES + (TABLES == 1 ? 0 : (int)at.y % n_subvectors);
  float sum = 0.0f;
  for (int i = 0; i < SUB; ++i) {
    const float product =
        mul((float)q[vector * SUB + i], (float)codebook[(table * C + at.x) * SUB + i]);
    sum = i == 0 ? product : sum + product;
  }
  lut[vector * C + at.x] = sum;
}

// Whether a matrix is the Walsh-Hadamard one to the rounding of whoever made it, as the CPU decides
// it: one threadgroup, flag[0] = 0 or 1.
template <int DIM, class Matrix, class Flag, class Shared>
VQ_FN void is_walsh_hadamard(Matrix matrix, Flag flag, Shared bad, uint self, uint n_threads) {
  const float scale = hadamard_scale(DIM);
  bool ok = (DIM & (DIM - 1)) == 0;
  for (uint i = self; i < DIM * DIM; i += n_threads) {
    const float wanted = (popcount((i / DIM) & (i % DIM)) & 1u) ? -scale : scale;
    ok = ok && fabs((float)matrix[i] - wanted) <= mul(1e-6f, scale);
  }
  const bool all_ok = simd_all(ok);
  if (self % 32 == 0) bad[self / 32] = all_ok ? 0u : 1u;
  barrier_of_group();
  if (self == 0) {
    uint any = 0;
    for (uint i = 0; i < n_threads / 32; ++i) any |= bad[i];
    flag[0] = any ? 0u : 1u;
  }
}

// u = x / lambda, y = matrix u, codes of y, out = (matrix^T y^) lambda as finite fp16.
// MATRIX: 0 none, 1 given (hadamard[0] says which way it is applied). LAMBDAS: 0 none, 1 shared,
// HEADS one per head. group: (tile, plane).
template <int DIM, int SUB, int C, int TABLES, int HEADS, int ROWS, int MATRIX, int LAMBDAS,
          class X, class Table, class Matrix, class Flag, class Lambda, class Out, class Codes,
          class Rows, class Tile>
VQ_FN void vecinfer_encode_decode(X x, int n_rows, int n_heads, Table codebook, Matrix matrix,
                                  Flag hadamard, Lambda lambda, Out out, Codes codes, Rows rows,
                                  Rows moved, Tile tile, uint3 group, uint self, uint n_threads) {
  const int M = DIM / SUB, first = (int)group.x * ROWS;
  const int64_t plane = group.y;
  const int head = (int)(plane % n_heads);
  const bool butterflies = MATRIX == 1 && hadamard[0] != 0;
  load_tile<DIM, ROWS>(x + plane * n_rows * DIM, first, n_rows, rows, self, n_threads);
  if (LAMBDAS > 0) {
    for (uint i = self; i < ROWS * DIM; i += n_threads) {  // a thread's own elements: no barrier
      const float factor = lambda[(LAMBDAS == 1 ? 0 : head) * DIM + i % DIM];
      if (factor > 1e-8f) rows[i] = rows[i] / factor;
    }
  }
  if (butterflies) hadamard_rows<DIM>(rows, ROWS, self, n_threads);
  if (MATRIX == 1 && !butterflies) {
    multiply_rows<DIM, false>(matrix, rows, moved, ROWS, self, n_threads);
    for (uint i = self; i < ROWS * DIM; i += n_threads) rows[i] = moved[i];
  }
  barrier_of_group();
  const int table = C * SUB, stride = TABLES == 1 ? 0 : table;
  Table tables = codebook + (int64_t)(HEADS == 1 ? 0 : head) * TABLES * table;
  nearest_codes<DIM, SUB, C, ROWS>(rows, tables, stride, tile, self / 32, n_threads / 32,
                                   self % 32);
  barrier_of_group();
  for (uint i = self; i < ROWS * DIM; i += n_threads) {
    const uint vector = i / SUB;
    rows[i] = tables[(int)(vector % M) * stride + (int)tile[vector] * SUB + (int)(i % SUB)];
  }
  if (butterflies) hadamard_rows<DIM>(rows, ROWS, self, n_threads);
  if (MATRIX == 1 && !butterflies) {
    multiply_rows<DIM, true>(matrix, rows, moved, ROWS, self, n_threads);
    for (uint i = self; i < ROWS * DIM; i += n_threads) rows[i] = moved[i];
  }
  barrier_of_group();
  for (uint i = self; i < ROWS * DIM; i += n_threads) {
    const int row = first + (int)(i / DIM);
    if (row >= n_rows) continue;
    float value = rows[i];
    if (LAMBDAS > 0) value = mul(value, lambda[(LAMBDAS == 1 ? 0 : head) * DIM + i % DIM]);
    out[(plane * n_rows + row) * DIM + i % DIM] = finite_half(value);
  }
  for (uint i = self; i < (uint)(ROWS * M); i += n_threads) {
    const int row = first + (int)i / M;
    if (row < n_rows) codes[(plane * n_rows + row) * M + i % M] = tile[i];
  }
}

}  // namespace veloxquant
