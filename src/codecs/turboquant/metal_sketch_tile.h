// Turboquant's `prod` form as attention reads it (src/attention/README.md, "Tiles on a GPU"): D
// numbers of levels, then D signs, each kind with a scalar of its own. Queries of keys come as R q
// and S R q; sums of values leave as those of levels and those of signs.
#pragma once

#include "src/codecs/metal_rows.h"

namespace veloxquant {

// DIM_: 2 D. levels: [16], by code. BITS: of the levels, 0 where there are signs alone. BY_TOKEN:
// values, four neighbours a piece.
template <int DIM_, int BITS, int BY_TOKEN, class Words, class Levels>
struct SketchedTile {
  enum {
    DIM = DIM_,
    SUB = BY_TOKEN ? 4 : 1,
    ROWS = DIM_ / 2,
    SIGNS = DIM_ * BITS,
    SCALARS = SIGNS + DIM_,
    WORDS = SCALARS + 64
  };
  Levels levels;
  Words words;
  uint32_t codes[BY_TOKEN ? 4 : 1];  // of four tokens; of values four each
  float level_scalars[4], sign_scalars[4];
  bool signs;
  int held, at;

  void open(Words block) {
    words = block;
    held = -1;
  }
  void load(int m, uint w) {
    if (held != (int)w) {
      held = (int)w;
      for (int i = 0; i < 4; ++i) {
        level_scalars[i] = near_half_at(words + SCALARS, 4 * held + i);
        sign_scalars[i] = near_half_at(words + SCALARS + 32, 4 * held + i);
      }
    }
    signs = m >= ROWS / SUB;
    const int piece = signs ? m - ROWS / SUB : m;
    for (int i = 0; i < (BY_TOKEN ? 4 : 1); ++i) {
      const int first = BY_TOKEN ? (4 * held + i) * ROWS + 4 * piece : 64 * piece + 4 * held;
      if (signs) codes[i] = words[SIGNS + first / 32] >> (first % 32);
      if (!signs && BITS > 0) codes[i] = bits_at(words, first * BITS, BITS > 0 ? 4 * BITS : 1);
    }
  }
  void token(uint i) { at = (int)i; }
  float value(int j) const {
    const uint32_t four = codes[BY_TOKEN ? at : 0];
    const int place = BY_TOKEN ? j : at;
    if (signs) return (four >> place) & 1u ? sign_scalars[at] : -sign_scalars[at];
    if (BITS == 0) return 0.0f;
    return level_scalars[at] * levels[(four >> (place * BITS)) & ((1u << BITS) - 1u)];
  }
  float factor(int) const { return 1.0f; }
};

}  // namespace veloxquant
