// Bit planes (RaBitQ, QJL) as tensor cores take them (src/attention/metal_tiles.h): levels are
// small whole numbers, made by putting the bits into a half's mantissa. A mean is added to sums,
// not to tokens.
#pragma once

#include "src/codecs/metal_pairs.h"

namespace veloxquant {

// factor_of_all: what the stored scalars are multiplied with.
template <int DIM_, int BITS, class Words>
struct PlanePairs {
  enum { DIM = DIM_, WORDS = 2 * DIM_ * BITS + 32, FACTORED = 1 };
  float factor_of_all;
  Words words;
  uint32_t planes[4][BITS];  // bits of the first and second number of a pair from bits 0, 16 on

  void open(Words block, int) { words = block; }
  float factor(int t) const { return factor_of_all * near_half_at(words + 2 * DIM_ * BITS, t); }

  uint32_t plane_bits(int d, int p, int token) const {
    const uint at = (uint)token;
    return words[(d * BITS + p) * 2 + (int)(at / 32u)] >> (at % 32u);
  }
  // 2 code - (2^BITS - 1) of bits i and 16 + i.
  uint32_t levels(int from, int i) const {
    uint32_t numbers = 0x64006400u;  // 1024: bit 0 of a half counts as 1
    VQ_UNROLL for (int p = 0; p < BITS; ++p) {
      const int up = p + 1 - i;
      const uint32_t bits = up >= 0 ? planes[from][p] << (up & 31) : planes[from][p] >> (-up & 31);
      numbers |= bits & (0x00010001u << (p + 1));
    }
    return half_differences(numbers, 0x64006400u + ((1u << BITS) - 1u) * 0x00010001u);
  }

  void load_keys(int quad, uint g) {
    VQ_UNROLL for (int h = 0; h < 2; ++h) {
      VQ_UNROLL for (int p = 0; p < BITS; ++p) {
        planes[h][p] = (plane_bits(4 * quad + 2 * h, p, 8 * (int)g) & 0xffu) |
                       ((plane_bits(4 * quad + 2 * h + 1, p, 8 * (int)g) & 0xffu) << 16);
      }
    }
  }
  template <int N>
  void key_pairs(int from, VQ_THREAD uint32_t (*w)[2]) const {
    VQ_UNROLL for (int j = 0; j < N; ++j) {
      w[j][0] = levels(0, from + j);
      w[j][1] = levels(1, from + j);
    }
  }
  void load_values(int quad, int s, uint c) {
    VQ_UNROLL for (int i = 0; i < 4; ++i) {
      VQ_UNROLL for (int p = 0; p < BITS; ++p) {
        const uint32_t bits = plane_bits(4 * quad + i, p, 16 * (int)c) >> (2 * s);
        planes[i][p] = (bits & 3u) | ((bits << 8) & 0x00030000u);
      }
    }
  }
  void value_pairs(VQ_THREAD uint32_t (*w)[2]) const {
    VQ_UNROLL for (int i = 0; i < 4; ++i) {
      w[i][0] = levels(i, 0);
      w[i][1] = levels(i, 1);
    }
  }
};

}  // namespace veloxquant
