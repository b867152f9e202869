// The scalar codecs on Metal (turboquant, its `prod` form, rvq): rows to codes and a scalar, and
// back. A threadgroup takes a tile of rows; element arithmetic is src/math/symmetric_scalar.h.
//
// quantizers: [STAGES][16], a stage's positive levels, from 8 on its boundaries.
#pragma once

#include "src/codecs/metal_rows.h"
#include "src/math/centroids.h"
#include "src/math/square_root.h"
#include "src/math/symmetric_scalar.h"

namespace veloxquant {

VQ_CONSTANT int kQuantizerNumbers = 16;

// SCALE as in veloxquant/turboquant.h: 0 |k| / |z|, 1 |k| / sqrt(D), 2 |k| sqrt(D) / <u, z>.
// rows: x, complete; becomes u. moved: becomes z, the sum of the stages' levels. codes:
// [STAGES][ROWS][DIM], norms, scalars (fp16 bits): [ROWS]. Complete after.
template <int DIM, int STAGES, int BITS, int SCALE, int ROTATE, int ROWS, class Rows, class Signs,
          class Quantizers, class Codes, class Norms, class Scalars>
VQ_FN void scalar_encode_rows(Rows rows, Rows moved, Signs signs, Quantizers quantizers,
                              Codes codes, Norms norms, Scalars scalars, uint self,
                              uint n_threads) {
  const uint lane = self % 32;
  barrier_of_group();
  for (uint r = self / 32; r < ROWS; r += n_threads / 32) {
    const float squares = simd_dot_row(rows + r * DIM, rows + r * DIM, DIM, lane);
    if (lane == 0) norms[r] = square_root(squares);
  }
  if (ROTATE) rotate_rows<DIM>(signs, rows, moved, ROWS, self, n_threads);
  barrier_of_group();
  const float root_dim = square_root((float)DIM);
  for (uint i = self; i < ROWS * DIM; i += n_threads) {
    const float u = mul(rows[i], unit_factor(norms[i / DIM], root_dim));
    float rest = u, z = 0.0f;
    for (int s = 0; s < STAGES; ++s) {
      Quantizers stage = quantizers + s * kQuantizerNumbers;
      const uint32_t code = symmetric_code(stage + 8, BITS, rest);
      const float level = symmetric_level(stage, BITS, code);
      codes[s * ROWS * DIM + i] = (uchar)code;
      z = s == 0 ? level : z + level;
      rest = rest - level;
    }
    rows[i] = u;
    moved[i] = z;
  }
  barrier_of_group();
  for (uint r = self / 32; r < ROWS; r += n_threads / 32) {
    float numerator = norms[r], denominator = root_dim;
    if (SCALE == 0) {
      denominator = square_root(simd_dot_row(moved + r * DIM, moved + r * DIM, DIM, lane));
    }
    if (SCALE == 2) {
      numerator = mul(numerator, root_dim);
      denominator = simd_dot_row(rows + r * DIM, moved + r * DIM, DIM, lane);
    }
    if (lane == 0) scalars[r] = stored_scalar(numerator, denominator);
  }
  barrier_of_group();
}

// The `prod` form's second stage: codes = signs of S r, scalars = gamma; r = u - z of its one
// stage. columns: S transposed [DIM][DIM]. rows: u, moved: z; both are lost.
template <int DIM, int ROWS, class Rows, class Columns, class Codes, class Norms, class Scalars>
VQ_FN void scalar_sketch_rows(Rows rows, Rows moved, Columns columns, Codes codes, Norms norms,
                              Scalars scalars, uint self, uint n_threads) {
  const uint lane = self % 32;
  for (uint i = self; i < ROWS * DIM; i += n_threads) rows[i] = rows[i] - moved[i];
  multiply_rows<DIM, true>(columns, rows, moved, ROWS, self, n_threads);
  for (uint i = self; i < ROWS * DIM; i += n_threads) codes[i] = moved[i] >= 0.0f ? 1 : 0;
  const float root_dim = square_root((float)DIM);
  for (uint r = self / 32; r < ROWS; r += n_threads / 32) {
    const float size = square_root(simd_dot_row(rows + r * DIM, rows + r * DIM, DIM, lane));
    const float factor = mul(norms[r], mul(size, kSketchFactor));
    if (lane == 0) scalars[r] = stored_scalar(factor, mul(root_dim, (float)DIM));
  }
  barrier_of_group();
}

// x [n_rows][DIM] -> words [n_rows][row_words], scalars fp16 [n_rows]: scalar_quantize of
// veloxquant/scalar_quant.h. tile: which rows.
template <int DIM, int BITS, int SCALE, int ROTATE, int ROWS, class X, class Signs,
          class Quantizers, class Words, class Scalars, class Rows, class Codes, class Norms,
          class Tile>
VQ_FN void scalar_quantize_rows(X x, int n_rows, Signs signs, Quantizers quantizers, Words words,
                                Scalars scalars, Rows rows, Rows moved, Codes codes, Norms norms,
                                Tile tile_scalars, uint tile, uint self, uint n_threads) {
  const int first = (int)tile * ROWS, per_word = 32 / BITS, row_words = (DIM - 1) / per_word + 1;
  load_tile<DIM, ROWS>(x, first, n_rows, rows, self, n_threads);
  for (uint i = self; i < ROWS * DIM; i += n_threads) rows[i] = finite_or_clamped(rows[i]);
  scalar_encode_rows<DIM, 1, BITS, SCALE, ROTATE, ROWS>(rows, moved, signs, quantizers, codes,
                                                        norms, tile_scalars, self, n_threads);
  for (uint i = self; i < (uint)(ROWS * row_words); i += n_threads) {
    const int r = (int)i / row_words, w = (int)i % row_words;
    if (first + r >= n_rows) continue;
    uint32_t word = 0u;
    for (int k = 0; k < per_word && w * per_word + k < DIM; ++k) {
      word |= (uint32_t)codes[r * DIM + w * per_word + k] << (k * BITS);
    }
    words[(int64_t)(first + r) * row_words + w] = word;
  }
  for (uint r = self; r < ROWS; r += n_threads) {
    if (first + (int)r < n_rows) scalars[first + r] = as_type<half>((ushort)tile_scalars[r]);
  }
}

// Back, in the type of `out`.
template <int DIM, int BITS, int ROTATE, int ROWS, class Out, class Words, class Scalars,
          class Signs, class Quantizers, class To, class Rows>
VQ_FN void scalar_dequantize_rows(Words words, Scalars scalars, int n_rows, Signs signs,
                                  Quantizers quantizers, To out, Rows rows, Rows moved, uint tile,
                                  uint self, uint n_threads) {
  const int first = (int)tile * ROWS, per_word = 32 / BITS, row_words = (DIM - 1) / per_word + 1;
  for (uint i = self; i < ROWS * DIM; i += n_threads) {
    const int row = first + (int)(i / DIM), d = (int)(i % DIM);
    rows[i] = 0.0f;
    if (row >= n_rows) continue;
    const uint32_t word = words[(int64_t)row * row_words + d / per_word];
    const uint32_t code = (word >> (d % per_word * BITS)) & ((1u << BITS) - 1u);
    const float f = f16_to_f32(as_type<ushort>((half)scalars[row]));
    rows[i] = mul(f, symmetric_level(quantizers, BITS, code));
  }
  if (ROTATE) rotate_rows_back<DIM>(signs, rows, moved, ROWS, self, n_threads);
  for (uint i = self; i < ROWS * DIM; i += n_threads) {
    const int row = first + (int)(i / DIM);
    if (row < n_rows) out[(int64_t)row * DIM + i % DIM] = FiniteNarrow<Out>::of(rows[i]);
  }
}

// The published forms: codes of the nearest of C given centroids. thread: a value.
template <int C, class X, class Table, class Codes>
VQ_FN void scalar_nearest(X x, Table centroids, Codes codes, uint i) {
  const float value = (float)x[i];
  float distance;
  codes[i] = (uint8_t)nearest_centroid(&value, 1, centroids, C, 1, &distance);
}

// The same of H (diag * row) / sqrt(DIM).
template <int DIM, int C, int ROWS, class X, class Diagonal, class Table, class Codes, class Rows>
VQ_FN void scalar_nearest_of_hadamard(X x, int n_rows, Diagonal diag, Table centroids, Codes codes,
                                      Rows rows, uint tile, uint self, uint n_threads) {
  const int first = (int)tile * ROWS;
  load_tile<DIM, ROWS>(x, first, n_rows, rows, self, n_threads);
  for (uint i = self; i < ROWS * DIM; i += n_threads) rows[i] = mul(rows[i], diag[i % DIM]);
  hadamard_rows<DIM>(rows, ROWS, self, n_threads);
  for (uint i = self; i < ROWS * DIM; i += n_threads) {
    const int row = first + (int)(i / DIM);
    if (row >= n_rows) continue;
    float distance;
    codes[(int64_t)row * DIM + i % DIM] =
        (uint8_t)nearest_centroid(rows + i, 1, centroids, C, 1, &distance);
  }
}

}  // namespace veloxquant
