// What the tiles leave: an item's part of a row from its simdgroups, and rows from their items.
#pragma once

#include "src/attention/metal_decode.h"
#include "src/attention/metal_tiles.h"

namespace veloxquant {

// The sums of rows [first, end) of a part that has none.
template <class Sums>
VQ_FN void put_nothing(Sums sums, int first, int end, uint self, uint n_threads) {
  for (int i = 2 * first + (int)self; i < 2 * end; i += (int)n_threads) {
    sums[i] = i % 2 == 0 ? -INFINITY : 0.0f;
  }
}

// The item's part and its sums from what the simdgroups have: rows first .. of n_rows. mean: added
// to every token (MEAN). stats: [n_simdgroups + 1][16 MT][2], scratch: [4 MT NV][33]. Complete
// before and after.
template <int DIM, int MEAN, int MT, int NV, class Mean, class Memory, class Parts, class Sums>
VQ_FN void put_merged(VQ_THREAD const TileSums<MT, NV>& own, Mean mean, Memory stats,
                      Memory scratch, int first, int n_rows, Parts parts, Sums sums, uint self,
                      uint n_threads) {
  const uint lane = self % 32, simdgroup = self / 32, n_simdgroups = n_threads / 32;
  Memory merged = stats + n_simdgroups * 32 * MT;
  float weight[MT][2];
  VQ_UNROLL for (int mt = 0; mt < MT; ++mt) {
    VQ_UNROLL for (int h = 0; h < 2; ++h) {
      const uint row = 16 * mt + 8 * h + lane / 4;
      float sum = own.sum[mt][h];
      sum += simd_shuffle_xor(sum, 1);
      sum += simd_shuffle_xor(sum, 2);
      if (lane % 4 == 0) {
        stats[(simdgroup * 16 * MT + row) * 2] = own.maximum[mt][h];
        stats[(simdgroup * 16 * MT + row) * 2 + 1] = sum * power_of_two(-kWeightShift);
      }
    }
  }
  barrier_of_group();
  VQ_UNROLL for (int mt = 0; mt < MT; ++mt) {
    VQ_UNROLL for (int h = 0; h < 2; ++h) {
      const uint row = 16 * mt + 8 * h + lane / 4;
      float most = -INFINITY, sum = 0.0f;
      for (uint w = 0; w < n_simdgroups; ++w) {
        most = max(most, (float)stats[(w * 16 * MT + row) * 2]);
      }
      for (uint w = 0; w < n_simdgroups; ++w) {
        const uint at = (w * 16 * MT + row) * 2;
        sum += power_below(stats[at], most) * stats[at + 1];
      }
      weight[mt][h] =
          power_below(own.maximum[mt][h], most) * own.unit * power_of_two(-kWeightShift);
      if (simdgroup == 0 && lane % 4 == 0) {
        merged[2 * row] = most;
        merged[2 * row + 1] = sum;
      }
    }
  }
  for (uint turn = 0; turn < n_simdgroups; ++turn) {
    barrier_of_group();
    if (turn != simdgroup) continue;
    VQ_UNROLL for (int mt = 0; mt < MT; ++mt) {
      VQ_UNROLL for (int i = 0; i < NV; ++i) {
        VQ_UNROLL for (int k = 0; k < 4; ++k) {
          const uint at = (((2 * mt + k / 2) * 2 + k % 2) * NV + i) * 33 + lane;
          const float x = own.own[mt][i][k] * weight[mt][k / 2];
          scratch[at] = turn == 0 ? x : scratch[at] + x;
        }
      }
    }
  }
  barrier_of_group();
  for (uint i = self; i < 16 * MT * DIM; i += n_threads) {
    const uint row = i / DIM, d = i % DIM;
    if (first + (int)row >= n_rows) continue;
    float x = scratch[((row / 8) * 2 * NV + d % (2 * NV)) * 33 + 4 * (row % 8) + d / (2 * NV)];
    if (MEAN) x = fma((float)merged[2 * row + 1], (float)mean[d], x);
    parts[(int64_t)(first + (int)row) * DIM + d] = x;
  }
  for (uint i = self; i < 32 * MT; i += n_threads) {
    if (first + (int)(i / 2) < n_rows) sums[2 * first + (int)i] = merged[i];
  }
  barrier_of_group();
}

// The same where every simdgroup has rows of its own, from row `first` on.
template <int DIM, int MEAN, int MT, int NV, class Mean, class Parts, class Sums>
VQ_FN void put_own(VQ_THREAD const TileSums<MT, NV>& own, Mean mean, int first, int n_rows,
                   Parts parts, Sums sums, uint lane) {
  const float unit = own.unit * power_of_two(-kWeightShift);
  VQ_UNROLL for (int mt = 0; mt < MT; ++mt) {
    VQ_UNROLL for (int h = 0; h < 2; ++h) {
      float sum = own.sum[mt][h];
      sum += simd_shuffle_xor(sum, 1);
      sum += simd_shuffle_xor(sum, 2);
      sum *= power_of_two(-kWeightShift);
      const int row = first + 16 * mt + 8 * h + (int)lane / 4;
      if (row >= n_rows) continue;
      VQ_UNROLL for (int e = 0; e < 2; ++e) {
        VQ_UNROLL for (int i = 0; i < NV; ++i) {
          const int d = NV * (2 * (int)(lane % 4) + e) + i;
          if (d >= DIM) continue;
          float x = own.own[mt][i][2 * h + e] * unit;
          if (MEAN) x = fma(sum, (float)mean[d], x);
          parts[(int64_t)row * DIM + d] = x;
        }
      }
      if (lane % 4 == 0) {
        sums[2 * row] = own.maximum[mt][h];
        sums[2 * row + 1] = sum;
      }
    }
  }
}

// A row of results from its items: parts [items][n_rows][DIM], sums [items][n_rows][2] of one KV
// head, the first n_packed in the codec's coordinates. SLICES simdgroups share a row, this one is
// `slice`. packed, exact: [SLICES][DIM], the first row of each is the result; stats: [SLICES][2].
// All threads; packed and exact are complete after.
template <int DIM, int SLICES, class Parts, class Sums, class Row>
VQ_FN void merge_row(Parts parts, Sums sums, int n_items, int n_packed, int n_rows, int row,
                     float sink, Row packed, Row exact, Row stats, VQ_THREAD float* maximum,
                     VQ_THREAD float* total, uint slice, uint lane) {
  float most = sink;
  for (int i = (int)lane; i < n_items; i += 32) {
    most = max(most, (float)sums[2 * ((int64_t)i * n_rows + row)]);
  }
  most = simd_max(most);
  constexpr int N = (DIM + 31) / 32;
  float own[2][N], sum = 0.0f;
  VQ_UNROLL for (int k = 0; k < N; ++k) own[0][k] = own[1][k] = 0.0f;
#pragma unroll 4
  for (int i = (int)slice; i < n_items; i += SLICES) {
    const int64_t at = (int64_t)i * n_rows + row;
    const float weight = power_below(sums[2 * at], most);
    sum += weight * sums[2 * at + 1];
    VQ_UNROLL for (int k = 0; k < N; ++k) {
      const int d = 32 * k + (int)lane;
      const float part = d < DIM ? (float)parts[at * DIM + d] : 0.0f;
      const float y = weight == 0.0f ? 0.0f : weight * part;  // then never written, perhaps
      own[0][k] += i < n_packed ? y : 0.0f;
      own[1][k] += i < n_packed ? 0.0f : y;
    }
  }
  VQ_UNROLL for (int k = 0; k < N; ++k) {
    const int d = 32 * k + (int)lane;
    if (d >= DIM) continue;
    packed[(int)slice * DIM + d] = own[0][k];
    exact[(int)slice * DIM + d] = own[1][k];
  }
  if (lane == 0) stats[slice] = sum;
  barrier_of_group();
  *maximum = most;
  *total = power_below(sink, most);
  for (int i = 0; i < SLICES; ++i) *total += stats[i];
  for (int d = 32 * (int)slice + (int)lane; SLICES > 1 && d < DIM; d += 32 * SLICES) {
    for (int i = 1; i < SLICES; ++i) {
      packed[d] += packed[i * DIM + d];
      exact[d] += exact[i * DIM + d];
    }
  }
  barrier_of_group();
}

// to_j = sum_i matrix[j][i] from_i, or (TRANSPOSED) matrix[i][j], by the simdgroups of a row.
// Complete after.
template <int DIM, int SLICES, int TRANSPOSED, class Matrix, class Row>
VQ_FN void multiply_back(Matrix matrix, Row from, Row to, uint slice, uint lane) {
  if (TRANSPOSED) {
    for (uint j = 32 * slice + lane; j < DIM; j += 32 * SLICES) {
      float sum = 0.0f;
      for (uint i = 0; i < DIM; ++i) sum = fma((float)from[i], (float)matrix[i * DIM + j], sum);
      to[j] = sum;
    }
  } else {
#pragma unroll 4
    for (uint j = slice; j < DIM; j += SLICES) {
      float sum = 0.0f;
      for (uint i = lane; i < DIM; i += 32) {
        sum = fma((float)from[i], (float)matrix[j * DIM + i], sum);
      }
      sum = simd_sum(sum);
      if (lane == 0) to[j] = sum;
    }
  }
  barrier_of_group();
}

}  // namespace veloxquant
