// Rows by a simdgroup: through a codec's transform and back, and queries into operands
// (metal_tiles.h).
#pragma once

#include "src/codecs/metal_pairs.h"

namespace veloxquant {

VQ_FN void barrier_of_simdgroup() { simdgroup_barrier(mem_flags::mem_threadgroup); }

// hadamard_row (src/math/hadamard.h); the row is complete before and after.
template <int DIM, class Row>
VQ_FN void simd_hadamard(Row row, uint lane) {
  for (int start = 0; start < DIM;) {
    const int block = hadamard_block(DIM - start);
    for (uint stride = 1; stride < (uint)block; stride *= 2) {
      for (uint i = lane; i < (uint)block / 2; i += 32) {
        const uint at = (uint)start + (((i & ~(stride - 1)) << 1) | (i & (stride - 1)));
        const float a = row[at], b = row[at + stride];
        row[at] = a + b;
        row[at + stride] = a - b;
      }
      barrier_of_simdgroup();
    }
    const float scale = hadamard_scale(block);
    for (uint i = lane; i < (uint)block; i += 32) row[(uint)start + i] *= scale;
    start += block;
  }
  barrier_of_simdgroup();
}

// rotate_row and rotate_row_back (src/math/rotation.h), likewise. moved: DIM numbers.
template <int DIM, class Signs, class Row>
VQ_FN void simd_rotate(Signs signs, Row row, Row moved, uint lane) {
  for (uint d = lane; d < DIM; d += 32) row[d] *= signs[d];
  barrier_of_simdgroup();
  simd_hadamard<DIM>(row, lane);
  const uint step = (uint)rotation_step(DIM);
  for (uint d = lane; d < DIM; d += 32) moved[d * step % DIM] = row[d];
  barrier_of_simdgroup();
  for (uint d = lane; d < DIM; d += 32) row[d] = moved[d] * signs[DIM + d];
  barrier_of_simdgroup();
  simd_hadamard<DIM>(row, lane);
}
template <int DIM, class Signs, class Row>
VQ_FN void simd_rotate_back(Signs signs, Row row, Row moved, uint lane) {
  simd_hadamard<DIM>(row, lane);
  const uint step = (uint)rotation_step(DIM);
  for (uint d = lane; d < DIM; d += 32) moved[d] = row[d] * signs[DIM + d];
  barrier_of_simdgroup();
  for (uint d = lane; d < DIM; d += 32) row[d] = moved[d * step % DIM];
  barrier_of_simdgroup();
  simd_hadamard<DIM>(row, lane);
  for (uint d = lane; d < DIM; d += 32) row[d] *= signs[d];
  barrier_of_simdgroup();
}

// Row r of 16 as operand A, in words: halves in units of a power of two, and with two PARTS what
// halves leave behind them, for a row that a transform made. MOVES: 0 none, 1 times moves, then
// Hadamard, 3 the rotation of these signs. bias: the row times mean (MEAN). row: [2 DIM]. `there`:
// else a row of zeros.
template <int DIM, int STEPS, int PARTS, int MOVES, int MEAN, class Q, class Moves, class Mean,
          class Row, class Words, class Numbers>
VQ_FN void put_query(Q q, bool there, Moves moves, Mean mean, Row row, Words to, uint r,
                     Numbers units, Numbers bias, uint lane) {
  float largest = 0.0f, product = 0.0f, nothing = 0.0f;
  if (there) {
    for (uint d = lane; d < DIM; d += 32)
      row[d] = MOVES == 1 ? (float)q[d] * moves[d] : (float)q[d];
    barrier_of_simdgroup();
    if (MOVES == 1) simd_hadamard<DIM>(row, lane);
    if (MOVES == 3) simd_rotate<DIM>(moves, row, row + DIM, lane);
    for (uint d = lane; d < DIM; d += 32) {
      largest = max(largest, fabs((float)row[d]));
      nothing += 0.0f * row[d];  // NaN in a row that is not finite, which then is NaN to the end
      if (MEAN) product = fma((float)row[d], (float)mean[d], product);
    }
  }
  largest = simd_max(largest);
  const float unit = float_of(clamp(bits_of(largest) & 0x7f800000u, 1u << 23, 252u << 23));
  if (MEAN) product = simd_sum(product);
  nothing = simd_sum(nothing);
  if (lane == 0) {
    units[r] = unit + nothing;
    bias[r] = product;
  }
  const float factor = 1.0f / unit;
  for (uint i = lane; i < 8 * STEPS; i += 32) {  // two dimensions
    const uint d = 2 * i;
    float first = there && d < DIM ? row[d] * factor : 0.0f;
    float second = there && d < DIM ? row[d + 1] * factor : 0.0f;
    // Step d / 16, lane 4 (r % 8) + d / 4 % 4; rows r and r + 8 in turn, then the next dimensions.
    const uint at = 4 * (32 * (d / 16) + 4 * (r % 8) + d / 4 % 4) + r / 8 + d % 4;
    VQ_UNROLL for (int part = 0; part < PARTS; ++part) {
      const uint32_t pair = half_pair(first, second);
      to[part * 128 * STEPS + (int)at] = pair;
      first -= half_of_pair(pair, 0);
      second -= half_of_pair(pair, 1);
    }
  }
  barrier_of_simdgroup();  // before the next row
}

}  // namespace veloxquant
