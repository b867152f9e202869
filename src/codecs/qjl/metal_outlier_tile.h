// Keys of QJL with outlier channels as attention reads them (src/attention/README.md, "Tiles on a
// GPU"): M rows of signs, then D channels. Queries come as S q and q. A channel counts where the
// block has it as an outlier: by what its own sketch says of it less what the main one says.
#pragma once

#include "src/codecs/metal_rows.h"

namespace veloxquant {

// numbers: the constants of both sketches, then their columns [D][M], [D][M_OUT]. FIXED: channels
// [OUTLIERS] of the head behind them; else a block has its own. Blocks are bytes: their length is a
// multiple of nothing.
template <int DIM_, int M, int M_OUT, int OUTLIERS, int FIXED, class Bytes, class Numbers>
struct OutlierTile {
  enum {
    DIM = DIM_,
    SUB = 1,
    NORMS = 8 * (M + M_OUT),
    WORDS = NORMS + 256 + (FIXED ? 0 : OUTLIERS)  // in bytes
  };
  Numbers numbers, channels;
  Bytes bytes;
  uint32_t signs;  // of four tokens
  float main[4], outer[4], own[4];
  bool row;
  int held, at;

  void open(Bytes block) {
    bytes = block;
    held = -1;
  }
  float norm(int place, int t) const {
    const uint32_t bits =
        (uint32_t)bytes[NORMS + place + 2 * t] | ((uint32_t)bytes[NORMS + place + 2 * t + 1] << 8);
    return (float)as_type<half>((ushort)bits);
  }
  uint32_t signs_of(int j) const { return (uint32_t)bytes[8 * j + held / 2] >> (4 * (held % 2)); }
  // sums[t] += factor[t] * sum_j sign_jt column[j]
  void add(int first, int n, Numbers column, VQ_THREAD const float* factor, float by) {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int j = 0; j < n; ++j) {
      const uint32_t four = signs_of(first + j);
      const float x = column[j];
      for (int i = 0; i < 4; ++i) sums[i] += (four >> i) & 1u ? x : -x;
    }
    for (int i = 0; i < 4; ++i) own[i] = fma(by * factor[i], sums[i], own[i]);
  }
  bool is_outlier(int channel) const {
    bool is = false;
    for (int k = 0; k < OUTLIERS; ++k) {
      is = is || channel == (FIXED ? (int)channels[k] : (int)bytes[NORMS + 256 + k]);
    }
    return is;
  }
  void load(int m, uint w) {
    if (held != (int)w) {
      held = (int)w;
      for (int i = 0; i < 4; ++i) {
        main[i] = numbers[0] * norm(0, 4 * held + i);
        outer[i] = numbers[1] * norm(128, 4 * held + i);
      }
    }
    row = m < M;
    if (row) {
      signs = signs_of(m);
      return;
    }
    const int channel = m - M;
    for (int i = 0; i < 4; ++i) own[i] = 0.0f;
    if (!is_outlier(channel)) return;
    add(0, M, numbers + 2 + channel * M, main, -1.0f);
    add(M, M_OUT, numbers + 2 + (DIM - M) * M + channel * M_OUT, outer, 1.0f);
  }
  void token(uint i) { at = (int)i; }
  float value(int) const {
    if (row) return (signs >> at) & 1u ? main[at] : -main[at];
    return own[at];
  }
  float factor(int) const { return 1.0f; }
};

}  // namespace veloxquant
