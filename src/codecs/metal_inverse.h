// Decoded rows out of a codec's coordinates on Metal: what Codec::inverse does on the CPU.
#pragma once

#include "src/codecs/metal_rows.h"

namespace veloxquant {

// y [n_rows][DIM] of a head -> out, rounded to OUT. TRANSFORM as in DecodeShape: 0 none, 1
// Hadamard, then the head's factors [DIM], 2 times its matrix [DIM][DIM], 3 the seeded rotation of
// signs [2][DIM]. tile: which rows.
template <int DIM, int ROWS, int TRANSFORM, class OUT, class Y, class Numbers, class Out,
          class Rows>
VQ_FN void inverse_rows(Y y, int n_rows, Numbers numbers, Out out, Rows rows, Rows moved, uint tile,
                        uint self, uint n_threads) {
  const int first = (int)tile * ROWS;
  load_tile<DIM, ROWS>(y, first, n_rows, rows, self, n_threads);
  if (TRANSFORM == 1) hadamard_rows<DIM>(rows, ROWS, self, n_threads);
  if (TRANSFORM == 2) multiply_rows<DIM, false>(numbers, rows, moved, ROWS, self, n_threads);
  if (TRANSFORM == 3) rotate_rows_back<DIM>(numbers, rows, moved, ROWS, self, n_threads);
  barrier_of_group();
  for (uint i = self; i < ROWS * DIM; i += n_threads) {
    const int row = first + (int)(i / DIM);
    if (row >= n_rows) continue;
    float value = TRANSFORM == 2 ? moved[i] : rows[i];
    if (TRANSFORM == 1) value = mul(value, numbers[i % DIM]);
    out[(int64_t)row * DIM + i % DIM] = Narrow<OUT>::of(value);
  }
}

}  // namespace veloxquant
