// CommVQ's blocks as attention reads them (src/attention/README.md, "Tiles on a GPU"). A piece is a
// pair; the codes of a token are those of all its pairs.
#pragma once

#include "src/codecs/metal_rows.h"
#include "src/codecs/rope/metal_tile.h"

namespace veloxquant {

// entries: [STAGES][N][2][DIM_ / 2] of the head.
template <int DIM_, int STAGES, int N, class Words, class Entries, class Numbers>
struct CommVQTile {
  enum { DIM = DIM_, SUB = 2, PAIRS = DIM_ / 2, WORDS = 24 * STAGES + 32, SHIFTED = 0 };
  Entries entries;
  Turning<Numbers> turning;
  Words first, words;
  uint32_t codes[4 * STAGES];  // of four tokens
  int held, pair;
  float x, y;

  void open(Words block) {
    words = block;
    held = -1;
    turning.start = turning.position + 64 * (int)((block - first) / WORDS);
  }
  void load(int m, uint w) {
    pair = m;
    if (held == (int)w) return;
    held = (int)w;
    // Codes of eight tokens are three words, those of four one and a half: the middle one is every
    // other lane's as well.
    const bool second = w % 2u != 0u;
    for (int s = 0; s < STAGES; ++s) {
      Words three = words + 24 * s + (int)(w / 2u) * 3;
      const uint64_t outer = three[second ? 2 : 0], middle = three[1];
      const uint64_t four = second ? (outer << 32 | middle) >> 16 : middle << 32 | outer;
      for (int i = 0; i < 4; ++i) codes[i * STAGES + s] = (uint32_t)(four >> (12 * i)) & 4095u;
    }
  }
  void token(uint i) {
    x = 0.0f;
    y = 0.0f;
    for (int s = 0; s < STAGES; ++s) {
      const uint32_t code = codes[(int)i * STAGES + s];
      const int last = N - 1;
      Entries a = entries + (s * N + min((int)(code / 64u), last)) * DIM_;
      Entries b = entries + (s * N + min((int)(code % 64u), last)) * DIM_;
      x += (float)a[pair] - (float)b[PAIRS + pair];
      y += (float)a[PAIRS + pair] + (float)b[pair];
    }
    turning.turn(pair, 4 * held + (int)i, &x, &y);
  }
  float value(int j) const { return j == 0 ? x : y; }
  void factors(uint w, VQ_THREAD float* to) const { four_halves(words + 24 * STAGES, w, to); }
};

}  // namespace veloxquant
