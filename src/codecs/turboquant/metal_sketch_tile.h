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
    WORDS = SCALARS + 64,
    STRETCH = 1,
    KINDS = 2,
    SHIFTED = 0
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
    signs = m >= ROWS / SUB;
    if (held != (int)w) {
      held = (int)w;
      if (BITS > 0) four_halves(words + SCALARS, w, level_scalars);
      four_halves(words + SCALARS + 32, w, sign_scalars);
    }
    const int piece = signs ? m - ROWS / SUB : m;
    if (BY_TOKEN) {
      if (signs) four_tokens<1, ROWS / 4>(words + SIGNS, w, piece, codes);
      if (!signs && BITS > 0) four_tokens<BITS, ROWS / 4>(words, w, piece, codes);
    } else {
      if (signs) codes[0] = four_codes<1>(words + SIGNS, piece * 16u + w);
      if (!signs && BITS > 0) codes[0] = four_codes<BITS>(words, piece * 16u + w);
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
  void factors(uint, VQ_THREAD float* to) const { all_ones(to); }
};

}  // namespace veloxquant
