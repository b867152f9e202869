// Packed blocks of RaBitQ on Metal: 64 tokens of a KV head to the bytes of format.h, and back. A
// threadgroup takes eight neighbouring tokens, which share the bytes of the bit planes. What
// decides a code is src/math/integer_levels.h.
#pragma once

#include "src/codecs/metal_rows.h"
#include "src/math/integer_levels.h"

namespace veloxquant {

// Steps and sums of the eight tokens of `rows` ([8][DIM], complete). A thread takes a token and a
// trial: each sum is one chain in ascending order. trials: [8][kStepTrials] cosines; steps [8];
// sums [8][3] as in LevelSums. Complete after.
template <int DIM, int BITS, class Rows, class Trials, class Steps, class Sums>
VQ_FN void find_level_steps(Rows rows, Trials trials, Steps steps, Sums sums, uint self,
                            uint n_threads) {
  barrier_of_group();
  if (BITS > 1) {
    for (uint r = self; r < 8; r += n_threads) {
      const float squares = level_sums(rows + r * DIM, 1, DIM, BITS, 0.0f).squares;
      steps[r] = mul(inverse_rms(squares, 1.0f / (float)DIM), kInverseStep[BITS]);
    }
    barrier_of_group();
    for (uint i = self; i < (uint)(8 * kStepTrials); i += n_threads) {
      const uint r = i / kStepTrials;
      const LevelSums trial =
          level_sums(rows + r * DIM, 1, DIM, BITS, mul(steps[r], kStepFactors[i % kStepTrials]));
      trials[i] = mul(trial.dots, trial.dots) / trial.levels;
    }
    barrier_of_group();
  }
  for (uint r = self; r < 8; r += n_threads) {
    float best = -1.0f, best_step = 0.0f;
    for (int k = 0; k < kStepTrials && BITS > 1; ++k) {
      if (!(trials[r * kStepTrials + k] > best)) continue;
      best = trials[r * kStepTrials + k];
      best_step = mul(steps[r], kStepFactors[k]);
    }
    const LevelSums chosen = level_sums(rows + r * DIM, 1, DIM, BITS, best_step);
    steps[r] = best_step;
    sums[3 * r] = chosen.squares;
    sums[3 * r + 1] = chosen.dots;
    sums[3 * r + 2] = chosen.levels;
  }
  barrier_of_group();
}

// Codes of `n_present` of eight tokens into byte `eighth` of the planes [DIM][BITS][8].
template <int DIM, int BITS, class Rows, class Steps, class Bytes>
VQ_FN void store_level_planes(Rows rows, Steps steps, int n_present, Bytes planes, int eighth,
                              uint self, uint n_threads) {
  for (uint d = self; d < DIM; d += n_threads) {
    uint32_t field[BITS];
    for (int p = 0; p < BITS; ++p) field[p] = 0u;
    for (int r = 0; r < n_present; ++r) {
      const uint32_t code = level_code(rows[r * DIM + d], BITS, steps[r]);
      for (int p = 0; p < BITS; ++p) field[p] |= ((code >> p) & 1u) << r;
    }
    for (int p = 0; p < BITS; ++p) planes[(d * BITS + p) * 8 + eighth] = (uint8_t)field[p];
  }
}

// The level of token t in row d of planes as 32-bit words.
template <int BITS, class Words>
VQ_FN float plane_level(Words planes, int d, int t) {
  uint32_t code = 0u;
  for (int p = 0; p < BITS; ++p) {
    code |= ((planes[(d * BITS + p) * 2 + t / 32] >> (t % 32)) & 1u) << p;
  }
  return (float)(2 * (int)code - ((1 << BITS) - 1));
}

// x [n_tokens][DIM] of one plane -> blocks. mean: rotated, [heads][DIM]. SCALE as in
// veloxquant/rabitq.h. group: (eighth, block, plane).
template <int DIM, int BITS, int SCALE, int MEAN, class X, class Signs, class Mean, class Bytes,
          class Rows, class Trials, class Steps, class Sums>
VQ_FN void rabitq_encode_blocks(X x, int n_tokens, int n_heads, int n_blocks, Signs signs,
                                Mean mean, Bytes blocks, Rows rows, Rows moved, Trials trials,
                                Steps steps, Sums sums, uint3 group, uint self, uint n_threads) {
  const int eighth = (int)group.x, first = 64 * (int)group.y + 8 * eighth;
  const int64_t plane = group.z;
  const int present = min(8, max(0, n_tokens - first));
  load_tile<DIM, 8>(x + plane * n_tokens * DIM, first, n_tokens, rows, self, n_threads);
  rotate_rows<DIM>(signs, rows, moved, 8, self, n_threads);
  if (MEAN) {
    for (uint i = self; i < (uint)(present * DIM); i += n_threads) {
      rows[i] = rows[i] - mean[plane % n_heads * DIM + i % DIM];
    }
  }
  find_level_steps<DIM, BITS>(rows, trials, steps, sums, self, n_threads);
  Bytes block = blocks + (plane * n_blocks + group.y) * (8 * DIM * BITS + 128);
  store_level_planes<DIM, BITS>(rows, steps, present, block, eighth, self, n_threads);
  for (uint r = self; r < 8; r += n_threads) {
    const ushort scalar = as_type<ushort>(
        finite_half(level_scalar(SCALE, sums[3 * r], sums[3 * r + 1], sums[3 * r + 2])));
    Bytes to = block + 8 * DIM * BITS + 2 * (8 * eighth + (int)r);
    to[0] = (uint8_t)scalar;
    to[1] = (uint8_t)(scalar >> 8);
  }
}

// blocks (as 32-bit words) -> y [n_blocks * 64][DIM] in the codec's coordinates. thread: (element
// of a block, block, plane).
template <int DIM, int BITS, int MEAN, class Words, class Mean, class Out>
VQ_FN void rabitq_decode_blocks(Words blocks, int n_blocks, int n_heads, Mean mean, Out out,
                                uint3 at) {
  const int t = (int)at.x / DIM, d = (int)at.x % DIM;
  const int64_t block = at.z * (int64_t)n_blocks + at.y;
  Words words = blocks + block * (2 * DIM * BITS + 32);
  float y = mul(plane_level<BITS>(words, d, t), half_at(words + 2 * DIM * BITS, t));
  if (MEAN) y = y + mean[(int64_t)at.z % n_heads * DIM + d];
  out[block * 64 * DIM + at.x] = y;
}

// Signs of rotated rows, and |y|^2 / |y|_1: rabitq_encode of veloxquant/rabitq.h. x [n_rows][DIM]
// -> codes [n_rows][DIM / 8], factors [n_rows].
template <int DIM, int ROWS, class X, class Signs, class Codes, class Factors, class Rows>
VQ_FN void rabitq_encode_rows(X x, int n_rows, Signs signs, Codes codes, Factors factors, Rows rows,
                              Rows moved, uint tile, uint self, uint n_threads) {
  const int first = (int)tile * ROWS;
  load_tile<DIM, ROWS>(x, first, n_rows, rows, self, n_threads);
  for (uint i = self; i < ROWS * DIM; i += n_threads) rows[i] = finite_or_clamped(rows[i]);
  rotate_rows<DIM>(signs, rows, moved, ROWS, self, n_threads);
  const uint present = (uint)min(ROWS, n_rows - first);
  for (uint i = self; i < present * (DIM / 8); i += n_threads) {
    uint32_t byte = 0u;
    for (uint k = 0; k < 8; ++k) byte |= (rows[i * 8 + k] >= 0.0f ? 1u : 0u) << k;
    codes[(int64_t)first * (DIM / 8) + i] = (uint8_t)byte;
  }
  for (uint r = self; r < present; r += n_threads) {
    const LevelSums sums = level_sums(rows + r * DIM, 1, DIM, 1, 0.0f);
    factors[first + (int)r] = level_scalar(0, sums.squares, sums.dots, sums.levels);
  }
}

}  // namespace veloxquant
