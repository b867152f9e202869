// RaBitQ's scans on Metal: a thread a code. Integers, a few products and sums: equal everywhere.
#pragma once

#include "src/codecs/metal_rows.h"

namespace veloxquant {

// out[i] = popcount((query ^ codes[i]) over N_DIMS bits) * scale + offset[i]
template <int N_DIMS, class Query, class Codes, class Offset, class Scale, class Out>
VQ_FN void hamming_scan(Query query, Codes codes, Offset offset, Scale scale, Out out, uint i) {
  const int n_bytes = (N_DIMS + 7) / 8;
  uint32_t distance = 0u;
  Codes code = codes + (int64_t)i * n_bytes;
  for (int b = 0; b < n_bytes; ++b) {
    const uint32_t mask = b + 1 == n_bytes && N_DIMS % 8 != 0 ? (1u << (N_DIMS % 8)) - 1u : 255u;
    distance += popcount(((uint32_t)query[b] ^ (uint32_t)code[b]) & mask);
  }
  out[i] = mul((float)distance, (float)scale[0]) + offset[i];
}

// Queries of the popcount score: rotated, and as integers of n_bits (quantize_popcount_query). q
// [n_rows][DIM] -> planes [n_rows][n_bits][DIM / 8], numbers [n_rows][4]: what a dot product and a
// count of ones are multiplied with, what is subtracted, and 1 where the query is finite.
template <int DIM, int ROWS, class Q, class Signs, class Planes, class Numbers, class Rows>
VQ_FN void popcount_queries(Q q, int n_rows, Signs signs, int n_bits, Planes planes,
                            Numbers numbers, Rows rows, Rows moved, Rows ranges, uint tile,
                            uint self, uint n_threads) {
  const int first = (int)tile * ROWS, present = min(ROWS, n_rows - first);
  const float most = (float)((1 << n_bits) - 1);
  load_tile<DIM, ROWS>(q, first, n_rows, rows, self, n_threads);
  rotate_rows<DIM>(signs, rows, moved, ROWS, self, n_threads);
  for (int r = (int)self; r < present; r += (int)n_threads) {
    Rows row = rows + r * DIM;
    float low = row[0], high = row[0];
    bool finite = true;
    for (int i = 0; i < DIM; ++i) {
      low = row[i] < low ? row[i] : low;
      high = row[i] > high ? row[i] : high;
      finite = finite && is_finite_bits(bits_of(row[i]));
    }
    float step = (high - low) / most;
    if (!(step > 0.0f) || !finite) step = 0.0f;
    uint32_t sum = 0u;
    for (int i = 0; i < DIM && step > 0.0f; ++i) {
      const float level = (row[i] - low) / step + 0.5f;
      sum += (uint32_t)(level < most ? level : most);
    }
    ranges[2 * r] = low;
    ranges[2 * r + 1] = step;
    Numbers to = numbers + (int64_t)(first + r) * 4;
    to[0] = mul(2.0f, step);
    to[1] = mul(2.0f, low);
    to[2] = mul(step, (float)sum) + mul(low, (float)DIM);
    to[3] = finite ? 1.0f : 0.0f;
  }
  barrier_of_group();
  for (int i = (int)self; i < present * n_bits * (DIM / 8); i += (int)n_threads) {
    const int byte = i % (DIM / 8), j = i / (DIM / 8) % n_bits, r = i / (DIM / 8) / n_bits;
    const float low = ranges[2 * r], step = ranges[2 * r + 1];
    uint32_t field = 0u;
    for (int k = 0; k < 8 && step > 0.0f; ++k) {
      const float level = (rows[r * DIM + 8 * byte + k] - low) / step + 0.5f;
      field |= (((uint32_t)(level < most ? level : most) >> j) & 1u) << k;
    }
    planes[(int64_t)first * n_bits * (DIM / 8) + i] = (uint8_t)field;
  }
}

// scores[row][key] of n_rows queries, `group` of which share the codes and factors of a key head:
// codes [..][n_keys][DIM / 8], factors [..][n_keys]. thread: (key, row).
template <int DIM, class Planes, class Numbers, class Codes, class Factors, class Scores>
VQ_FN void popcount_scores(Planes planes, Numbers numbers, int n_bits, Codes codes, Factors factors,
                           int n_keys, int group, Scores scores, uint3 at) {
  const int64_t row = at.y, key = row / group * n_keys + at.x;
  uint32_t dot = 0u, count = 0u;
  for (int b = 0; b < DIM / 8; ++b) {
    const uint32_t code = codes[key * (DIM / 8) + b];
    count += popcount(code);
    for (int j = 0; j < n_bits; ++j) {
      dot += popcount(code & (uint32_t)planes[(row * n_bits + j) * (DIM / 8) + b]) << j;
    }
  }
  const float sum = mul(numbers[row * 4], (float)dot) + mul(numbers[row * 4 + 1], (float)count) -
                    numbers[row * 4 + 2];
  const bool finite = numbers[row * 4 + 3] > 0.0f;
  scores[row * n_keys + at.x] = finite ? mul(factors[key], sum) : float_of(0x7fc00000u);
}

}  // namespace veloxquant
