// Packed blocks of the scalar codecs as tensor cores take them (src/attention/metal_tiles.h).
#pragma once

#include "src/codecs/metal_pairs.h"

namespace veloxquant {

// Fields of B bits: those with even (odd) numbers of two words, side by side.
VQ_FN uint32_t even_fields(int bits) {
  return bits == 1 ? 0x55555555u : bits == 2 ? 0x33333333u : bits == 3 ? 0x071c71c7u : 0x0f0f0f0fu;
}
template <int B>
VQ_FN uint32_t fields_of_both(uint32_t a, uint32_t b, bool odd) {
  const uint32_t even = even_fields(B);
  return odd ? ((a >> B) & even) | (b & (even << B)) : (a & even) | ((b & even) << B);
}
// Fields of B bits, B at most 2, of 16 bits in all, B zeros behind each.
template <int B>
VQ_FN uint32_t fields_apart(uint32_t x) {
  x = ((x & 0xff00u) << 8) | (x & 0xffu);
  x = ((x << 4) | x) & 0x0f0f0f0fu;
  x = ((x << 2) | x) & 0x33333333u;
  return B == 2 ? x : ((x << 1) | x) & 0x55555555u;
}

// The level of a code whose stages follow each other from the low bits on. levels: [STAGES][16].
template <int STAGES, int BITS, class Levels>
VQ_FN float level_of_stages(Levels levels, uint32_t code) {
  float sum = 0.0f;
  VQ_UNROLL for (int s = 0; s < STAGES; ++s) {
    const float level = levels[16 * s + (int)((code >> (s * BITS)) & ((1u << BITS) - 1u))];
    sum = s == 0 ? level : sum + level;
  }
  return sum;
}

// A look-up of `ScalarPairs`: the levels of a code and of the one above it in i, or one level
// twice.
template <int STAGES, int BITS, class Levels>
VQ_FN uint32_t level_pair(Levels levels, uint32_t i) {
  const int code = STAGES * BITS;
  return half_pair(level_of_stages<STAGES, BITS>(levels, i & ((1u << code) - 1u)),
                   level_of_stages<STAGES, BITS>(levels, code <= 3 ? i >> code : i));
}

// pairs: [2^(2 CODE)] where PAIRED, else [2^CODE], each by level_pair.
template <int DIM_, int STAGES, int BITS, class Words, class Pairs>
struct ScalarPairs {
  enum {
    DIM = DIM_,
    PLANE = 2 * DIM_ * BITS,
    WORDS = STAGES * PLANE + 32,
    FACTORED = 1,
    CODE = STAGES * BITS,
    PAIRED = CODE <= 3,
    FUSED = STAGES == 1 || BITS <= 2,  // codes of the stages side by side
    HELD = FUSED ? 1 : STAGES
  };
  Pairs pairs;
  Words words;
  uint32_t raw[4][STAGES], next[4][BITS == 3 ? STAGES : 1];
  uint shift[4];
  int skipped;
  uint32_t codes[4][HELD];  // of four dimensions eight tokens each, of four tokens four dimensions

  void open(Words block, int) { words = block; }
  uint32_t factor_word(int t) const { return words[STAGES * PLANE + t / 2]; }
  float factor(uint32_t word, int t) const { return half_of_pair(word, t % 2); }

  // Fields from number `first` of the planes on, n of them: the words alone. `later`: bits from
  // there on, within the words of the n.
  void ask(int to, int first, int n, int later) {
    const uint at = (uint)(first * BITS);
    shift[to] = at % 32u;
    skipped = later % 32;
    if (BITS == 3) skipped = later;
    VQ_UNROLL for (int s = 0; s < STAGES; ++s) {
      Words from = words + (s * PLANE + (int)(at / 32u));
      raw[to][s] = from[BITS == 3 ? 0 : later / 32];
      if (BITS == 3) {
        next[to][s % (BITS == 3 ? STAGES : 1)] = from[(shift[to] + (uint)(n * BITS - 1)) / 32u];
      }
    }
  }
  void arrive() {
    VQ_UNROLL for (int to = 0; to < 4; ++to) {
      VQ_UNROLL for (int s = 0; s < STAGES; ++s) {
        uint32_t fields = raw[to][s] >> shift[to];
        if (BITS == 3) {  // 64 bits from `shift` on
          const uint32_t more = next[to][s % (BITS == 3 ? STAGES : 1)];
          fields |= (more << 1) << (31u - shift[to]);
          const uint32_t rest = more >> shift[to];
          if (skipped > 0) {
            fields = skipped < 32 ? (fields >> (skipped & 31)) | (rest << ((32 - skipped) & 31))
                                  : rest >> ((skipped - 32) & 31);
          }
        } else {
          fields >>= skipped;
        }
        if (!FUSED || STAGES == 1) {
          codes[to][s % HELD] = fields;
        } else {  // of 16 bits, which neighbours share
          const uint32_t apart = fields_apart<BITS>(raw[to][s] >> (shift[to] & 16u));
          const uint32_t own = apart >> (2u * ((shift[to] & 15u) + (uint)skipped));
          codes[to][0] = s == 0 ? own : codes[to][0] | (own << BITS);
        }
      }
    }
  }
  void arrive_keys() { arrive(); }
  void arrive_values() { arrive(); }
  // Look-up number `bits` of x from bit `at` on, by its place in bytes: one operation less.
  static uint32_t place(uint32_t x, int at, int bits) {
    return (at >= 2 ? x >> ((at - 2) & 31) : x << ((2 - at) & 31)) & (((1u << bits) - 1u) << 2);
  }
  uint32_t look_up(uint32_t bytes) const {
    return *(const VQ_GROUP uint32_t*)((const VQ_GROUP uchar*)pairs + bytes);
  }
  uint32_t one_of(int from, int i) const {
    if (FUSED) return look_up(place(codes[from][0], i * CODE, CODE));
    uint32_t bytes = 0u;
    VQ_UNROLL for (int s = 0; s < HELD; ++s) {
      bytes |= place(codes[from][s], i * BITS, BITS) << (s * BITS);
    }
    return look_up(bytes);
  }
  // Field i of two of the loaded.
  uint32_t pair_of(int a, int b, int i) const {
    if (!PAIRED) return first_halves(one_of(a, i), one_of(b, i));
    const uint32_t both =
        fields_of_both < PAIRED ? CODE : 1 > (codes[a][0], codes[b][0], i % 2 == 1);
    return look_up(place(both, i / 2 * 2 * CODE, PAIRED ? 2 * CODE : 1));
  }

  void load_keys(int quad, uint g) {
    VQ_UNROLL for (int i = 0; i < 4; ++i) ask(i, (4 * quad + i) * 64 + 8 * (int)g, 8, 0);
  }
  template <int N>
  void key_pairs(int from, VQ_THREAD uint32_t (*w)[2]) const {
    VQ_UNROLL for (int j = 0; j < N; ++j) {
      w[j][0] = pair_of(0, 1, from + j);
      w[j][1] = pair_of(2, 3, from + j);
    }
  }
  // Quad u of the lane's `quads`: where these lie in few words, asked for by all of them alike.
  void load_values(int quads, int u, int s, uint g, uint c) {
    const int run = 4 * quads * BITS, most = DIM_ / 4 - 1;
    const bool alike = DIM_ % 32 == 0 && (run <= 32 ? 32 % run == 0 : run % 32 == 0 || BITS == 3) &&
                       (BITS != 3 || run == 48) && (!FUSED || STAGES == 1 || run == 16);
    const int first = alike ? 4 * quads * (int)g : 4 * min(quads * (int)g + u, most);
    VQ_UNROLL for (int i = 0; i < 4; ++i) {
      const int t = 16 * (int)c + 2 * s + i / 2 + 8 * (i % 2);
      ask(i, t * DIM_ + first, alike ? 4 * quads : 4, alike ? 4 * u * BITS : 0);
    }
  }
  void value_pairs(VQ_THREAD uint32_t (*w)[2]) const {
    VQ_UNROLL for (int i = 0; i < 4; ++i) {
      w[i][0] = pair_of(0, 1, i);
      w[i][1] = pair_of(2, 3, i);
    }
  }
};

}  // namespace veloxquant
