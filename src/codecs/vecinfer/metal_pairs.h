// VecInfer's packed blocks as tensor cores take them (src/attention/metal_tiles.h).
#pragma once

#include "src/codecs/metal_pairs.h"
#include "src/codecs/vecinfer/metal_codes.h"
#include "src/codecs/vecinfer/metal_fragments.h"

namespace veloxquant {

// Unit p of four dimensions.
VQ_FN void put_unit(uint2 unit, int, VQ_THREAD uint2* four) { *four = unit; }
VQ_FN void put_unit(uint32_t unit, int p, VQ_THREAD uint2* four) {
  if (p == 0) four->x = unit;
  if (p == 1) four->y = unit;
}
VQ_FN void put_unit(ushort unit, int p, VQ_THREAD uint2* four) {
  const uint32_t placed = (uint32_t)unit << (p % 2 * 16);
  if (p < 2) four->x |= placed;
  if (p >= 2) four->y |= placed;
}

// CHUNKS: 0 portable blocks, else fragment order. Table: of units of UNIT dimensions, in whatever
// memory: uint2, uint or ushort.
template <int DIM_, int SUB, int C, int BITS, int TABLES, int VALUES, int CHUNKS, class Words,
          class Table>
struct VecInferPairs {
  enum {
    DIM = DIM_,
    WORDS = CHUNKS > 0 ? 128 * CHUNKS : DIM_ / SUB * 2 * BITS,
    FACTORED = 0,
    UNIT = SUB % 4 == 0 ? 4
           : SUB == 2   ? 2
                        : 1,
    PIECES = 4 / UNIT
  };
  Table table;
  Words words;
  uint32_t low[2 * PIECES], high[BITS > 8 ? 2 * PIECES : 1];  // four codes each
  int dim, odd;

  void open(Words block, int) { words = block; }
  uint32_t factor_word(int) const { return 0u; }
  float factor(uint32_t, int) const { return 1.0f; }
  void arrive_keys() {}
  void arrive_values() {}

  void load_words(int quad, uint first, uint second) {
    dim = 4 * quad;
    VQ_UNROLL for (int p = 0; p < PIECES; ++p) {
      const int m = (dim + UNIT * p) / SUB;
      VQ_UNROLL for (int i = 0; i < 2; ++i) {
        const uint w = i == 0 ? first : second;
        if (CHUNKS > 0) {
          low[2 * p + i] = fragment_codes<VALUES, CHUNKS>(words, m, w);
        } else {
          Words row = words + m * vecinfer_row_words(BITS);
          low[2 * p + i] = vecinfer_low_codes<BITS>(row, w);
          if (BITS > 8) high[2 * p + i] = vecinfer_high_codes<BITS>(row, w);
        }
      }
    }
  }
  // Four dimensions of the token at byte `byte` of loaded word i.
  uint2 quad_of(int i, uint byte) const {
    uint2 four = {0u, 0u};
    VQ_UNROLL for (int p = 0; p < PIECES; ++p) {
      const int m = (dim + UNIT * p) / SUB, within = (dim + UNIT * p) % SUB;
      const uint32_t code =
          vecinfer_code<BITS, C>(low[2 * p + i], BITS > 8 ? high[2 * p + i] : 0u, byte);
      put_unit(table[(((TABLES == 1 ? 0 : m * C) + (int)code) * SUB + within) / UNIT], p, &four);
    }
    return four;
  }

  void load_keys(int quad, uint g) { load_words(quad, 2 * g, 2 * g + 1); }
  template <int N>
  void key_pairs(int from, VQ_THREAD uint32_t (*w)[2]) const {
    VQ_UNROLL for (int j = 0; j < N; ++j) {
      const uint2 four = quad_of((from + j) / 4, (uint)(from + j) % 4);
      w[j][0] = four.x;
      w[j][1] = four.y;
    }
  }
  void load_values(int quads, int u, int s, uint g, uint c) {
    load_words(value_quad<DIM_>(quads, u, g), 4 * c + (uint)s / 2, 4 * c + 2 + (uint)s / 2);
    odd = s % 2;
  }
  void value_pairs(VQ_THREAD uint32_t (*w)[2]) const {
    const uint at = 2 * (uint)odd;
    turned_pairs(quad_of(0, at), quad_of(1, at), quad_of(0, at + 1), quad_of(1, at + 1), w);
  }
};

}  // namespace veloxquant
