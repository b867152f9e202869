// Attention by tiles of 64 tokens on tensor cores (metal_mma.h): scores, online softmax, sums.
//
// Rows of queries are operand A, 16 to a tile of rows, a lane has rows g and g + 8. Which token and
// which dimension an operand's place stands for is free, so it is chosen for the codecs: a lane
// decodes eight neighbouring tokens of keys, 16 of values, four neighbouring dimensions at a time.
//
//   keys    step s, column g of product j: token 8 g + j; rows of a lane: dimensions 16 s + 4 c ..
//   values  step s, rows of a lane: tokens 16 c + 2 s, + 8, + 1, + 9; column g of product
//           4 u + i: dimension 4 (QUADS g + u) + i
//
// so the sums of scores are, as they lie, the weights of the values. What a codec multiplies a
// token with goes to scores and weights in fp32.
#pragma once

#include "src/attention/metal_operands.h"

namespace veloxquant {

VQ_CONSTANT float kWeightShift = 12.0f;  // weights are kept times 2^12: halves reach further down

// Rows of a lane. A query sees positions [begin, end). unit: of the halves of a query.
template <int MT>
struct TileRows {
  int begin[MT][2], end[MT][2];
  float unit[MT][2], bias[MT][2];
  int64_t mask[MT][2];
};

// Sums of a lane's rows: own times 2^-12 unit are values; sum is times 2^12 as well.
template <int MT, int NV>
struct TileSums {
  float own[MT][NV][4];
  float maximum[MT][2], sum[MT][2];
  float unit;

  void clear() {
    unit = float_of(1u << 23);
    VQ_UNROLL for (int mt = 0; mt < MT; ++mt) {
      VQ_UNROLL for (int n = 0; n < NV; ++n) {
        VQ_UNROLL for (int k = 0; k < 4; ++k) own[mt][n][k] = 0.0f;
      }
      VQ_UNROLL for (int h = 0; h < 2; ++h) {
        maximum[mt][h] = -INFINITY;
        sum[mt][h] = 0.0f;
      }
    }
  }
};

// Scores of products from .. from + N - 1. queries: [MT][PARTS][STEPS][32]
template <int MT, int STEPS, int PARTS, int N, class Operands, class Queries>
VQ_FN void tile_scores(VQ_THREAD Operands& operands, Queries queries, int from,
                       VQ_THREAD float (*score)[N][4], uint lane) {
  VQ_UNROLL for (int mt = 0; mt < MT; ++mt) {
    VQ_UNROLL for (int j = 0; j < N; ++j) {
      VQ_UNROLL for (int k = 0; k < 4; ++k) score[mt][j][k] = 0.0f;
    }
  }
#pragma unroll 4
  for (int s = 0; s < STEPS; ++s) {
    uint32_t w[N][2];
    operands.template keys<N>(s, from, lane, w);
    VQ_UNROLL for (int i = 0; i < MT * PARTS; ++i) {
      const uint4 a = queries[(i * STEPS + s) * 32 + (int)lane];
      VQ_UNROLL for (int j = 0; j < N; ++j) {
        add_product(score[i / PARTS][j], a, w[j][0], w[j][1], lane);
      }
    }
  }
}

template <int MT, int NV, class Operands>
VQ_FN void tile_values(VQ_THREAD Operands& operands, VQ_THREAD const uint4 (*weights)[4],
                       VQ_THREAD TileSums<MT, NV>& sums, uint lane) {
  VQ_UNROLL for (int u = 0; u < NV / 4; ++u) {
    VQ_UNROLL for (int s = 0; s < 4; ++s) {
      uint32_t w[4][2];
      operands.values(NV / 4, 4 * u + s, lane, w);
      VQ_UNROLL for (int mt = 0; mt < MT; ++mt) {
        VQ_UNROLL for (int i = 0; i < 4; ++i) {
          add_product(sums.own[mt][4 * u + i], weights[mt][s], w[i][0], w[i][1], lane);
        }
      }
    }
  }
}

// Scores of products from .. from + N - 1 of a tile of n tokens at `position` into weights, operand
// A of the values' products. factors: of put_factors. KEYS, VALUES: whether the sides have them.
template <int SOFTCAP, int MASK, int KEYS, int VALUES, int N, int MT, int NV, class Factors,
          class Mask>
VQ_FN void tile_weights(VQ_THREAD float (*score)[N][4], int from, Factors factors, int n,
                        int position, float cap, VQ_THREAD const TileRows<MT>& rows, Mask mask,
                        int64_t mask_step, VQ_THREAD TileSums<MT, NV>& sums,
                        VQ_THREAD uint4 (*weights)[4], uint lane) {
  const int c = (int)lane % 4;
  bool whole = n >= 64;
  VQ_UNROLL for (int mt = 0; mt < MT; ++mt) {
    VQ_UNROLL for (int h = 0; h < 2; ++h) {
      whole = whole && rows.begin[mt][h] <= position && rows.end[mt][h] >= position + 64;
    }
  }
  whole = simd_all(whole);
  float unit = VALUES ? sums.unit : 1.0f;
  if (VALUES && from == 0) {
    float largest = 0.0f;
    VQ_UNROLL for (int i = 0; i < 16; ++i) {
      largest = max(largest, fabs((float)factors[64 + 16 * c + i]));
    }
    largest = max(largest, simd_shuffle_xor(largest, 1));
    largest = max(largest, simd_shuffle_xor(largest, 2));
    unit = max(unit, float_of((bits_of(largest) & 0x7f800000u) + (1u << 23)));
  }
  const float inverse = VALUES ? 1.0f / unit : 1.0f, change = VALUES ? sums.unit * inverse : 1.0f;
  sums.unit = unit;
  bool same = change == 1.0f;
  float fresh[MT][2], base[MT][2];
  VQ_UNROLL for (int mt = 0; mt < MT; ++mt) {
    float largest[2] = {sums.maximum[mt][0], sums.maximum[mt][1]};
    VQ_UNROLL for (int j = 0; j < N; ++j) {
      VQ_UNROLL for (int k = 0; k < 4; ++k) {
        const int t = 16 * c + 8 * (k % 2) + from + j, h = k / 2;
        float x = score[mt][j][k] * rows.unit[mt][h];
        if (KEYS) x = fma(x, (float)factors[t], rows.bias[mt][h]);
        if (SOFTCAP) x = cap * M_LOG2E_F * tanh(x / (cap * M_LOG2E_F));
        score[mt][j][k] = x;
      }
    }
    if (MASK || !whole) {
      VQ_UNROLL for (int j = 0; j < N; ++j) {
        VQ_UNROLL for (int k = 0; k < 4; ++k) {
          const int t = 16 * c + 8 * (k % 2) + from + j, h = k / 2, at = position + t;
          const bool seen = t < n && at >= rows.begin[mt][h] && at < rows.end[mt][h];
          float x = score[mt][j][k];
          if (MASK && seen) x += M_LOG2E_F * (float)mask[rows.mask[mt][h] + at * mask_step];
          score[mt][j][k] = seen ? x : -INFINITY;
        }
      }
    }
    VQ_UNROLL for (int j = 0; j < N; ++j) {
      VQ_UNROLL for (int k = 0; k < 4; ++k) largest[k / 2] = max(largest[k / 2], score[mt][j][k]);
    }
    VQ_UNROLL for (int h = 0; h < 2; ++h) {
      largest[h] = max(largest[h], simd_shuffle_xor(largest[h], 1));
      largest[h] = max(largest[h], simd_shuffle_xor(largest[h], 2));
      // -inf - -inf: a row that has seen nothing yet.
      base[mt][h] = largest[h] == -INFINITY ? 0.0f : largest[h];
      fresh[mt][h] = power_of_two(sums.maximum[mt][h] - base[mt][h]);
      sums.maximum[mt][h] = largest[h];
      same = same && fresh[mt][h] == 1.0f;
    }
  }
  if (!simd_all(same)) {
    VQ_UNROLL for (int mt = 0; mt < MT; ++mt) {
      VQ_UNROLL for (int h = 0; h < 2; ++h) sums.sum[mt][h] *= fresh[mt][h];
      VQ_UNROLL for (int i = 0; i < NV; ++i) {
        VQ_UNROLL for (int k = 0; k < 4; ++k) sums.own[mt][i][k] *= fresh[mt][k / 2] * change;
      }
      const uint32_t first = half_pair(fresh[mt][0], fresh[mt][0]);
      const uint32_t second = half_pair(fresh[mt][1], fresh[mt][1]);
      VQ_UNROLL for (int s = 0; s < from / 2; ++s) {  // weights that wait for their values
        const uint4 old = weights[mt][s];
        const uint4 now = {half_products(old.x, first), half_products(old.y, second),
                           half_products(old.z, first), half_products(old.w, second)};
        weights[mt][s] = now;
      }
    }
  }
  VQ_UNROLL for (int mt = 0; mt < MT; ++mt) {
    VQ_UNROLL for (int j = 0; j < N; ++j) {
      VQ_UNROLL for (int k = 0; k < 4; ++k) {
        const int t = 16 * c + 8 * (k % 2) + from + j, h = k / 2;
        const float power = power_of_two(score[mt][j][k] - (base[mt][h] - kWeightShift));
        sums.sum[mt][h] += power;
        score[mt][j][k] = VALUES ? power * (factors[64 + t] * inverse) : power;
      }
    }
    VQ_UNROLL for (int s = 0; s < N / 2; ++s) {
      VQ_THREAD const float* a = score[mt][2 * s];
      VQ_THREAD const float* b = score[mt][2 * s + 1];
      const uint4 words = {half_pair(a[0], a[1]), half_pair(a[2], a[3]), half_pair(b[0], b[1]),
                           half_pair(b[2], b[3])};
      weights[mt][from / 2 + s] = words;
    }
  }
}

// Both, N products at a time: fewer registers for more rows.
template <int SOFTCAP, int MASK, int STEPS, int PARTS, int KEYS, int VALUES, int N, int MT, int NV,
          class Operands, class Queries, class Factors, class Mask>
VQ_FN void tile_softmax(VQ_THREAD Operands& operands, Queries queries, Factors factors, int n,
                        int position, float cap, VQ_THREAD const TileRows<MT>& rows, Mask mask,
                        int64_t mask_step, VQ_THREAD TileSums<MT, NV>& sums,
                        VQ_THREAD uint4 (*weights)[4], uint lane) {
  VQ_UNROLL for (int from = 0; from < 8; from += N) {
    float score[MT][N][4];
    tile_scores<MT, STEPS, PARTS, N>(operands, queries, from, score, lane);
    tile_weights<SOFTCAP, MASK, KEYS, VALUES, N>(score, from, factors, n, position, cap, rows, mask,
                                                 mask_step, sums, weights, lane);
  }
}

}  // namespace veloxquant
