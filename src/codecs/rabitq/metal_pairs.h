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
  uint32_t raw[4][BITS];
  uint32_t planes[4][BITS];  // bits of the first and second number of a pair from bits 0, 16 on
  uint shift;
  int first;

  void open(Words block, int) { words = block; }
  uint32_t factor_word(int t) const { return words[2 * DIM_ * BITS + t / 2]; }
  float factor(uint32_t word, int t) const { return factor_of_all * half_of_pair(word, t % 2); }

  // Planes of four dimensions from a token on.
  void ask(int quad, uint token) {
    shift = token % 32u;
    VQ_UNROLL for (int i = 0; i < 4; ++i) {
      VQ_UNROLL for (int p = 0; p < BITS; ++p) {
        raw[i][p] = words[((4 * quad + i) * BITS + p) * 2 + (int)(token / 32u)];
      }
    }
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

  void load_keys(int quad, uint g) { ask(quad, 8 * g); }
  void arrive_keys() {
    VQ_UNROLL for (int h = 0; h < 2; ++h) {
      VQ_UNROLL for (int p = 0; p < BITS; ++p) {
        planes[h][p] =
            ((raw[2 * h][p] >> shift) & 0xffu) | (((raw[2 * h + 1][p] >> shift) & 0xffu) << 16);
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
  void load_values(int quads, int u, int s, uint g, uint c) {
    ask(value_quad<DIM_>(quads, u, g), 16 * c);
    first = 2 * s;
  }
  void arrive_values() {
    VQ_UNROLL for (int i = 0; i < 4; ++i) {
      VQ_UNROLL for (int p = 0; p < BITS; ++p) {
        const uint32_t bits = raw[i][p] >> shift;
        planes[i][p] = (bits & 0xffu) | ((bits & 0xff00u) << 8);
      }
    }
  }
  void value_pairs(VQ_THREAD uint32_t (*w)[2]) const {
    VQ_UNROLL for (int i = 0; i < 4; ++i) {
      w[i][0] = levels(i, first);
      w[i][1] = levels(i, first + 1);
    }
  }
};

}  // namespace veloxquant
