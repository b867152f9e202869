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
    WORDS = NORMS + 256 + (FIXED ? 0 : OUTLIERS),  // in bytes
    SHIFTED = 0
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
  int outlier(int k) const { return FIXED ? (int)channels[k] : (int)bytes[NORMS + 256 + k]; }
  bool is_outlier(int channel) const {
    bool is = false;
    for (int k = 0; k < OUTLIERS; ++k) is = is || channel == outlier(k);
    return is;
  }
  Numbers main_column(int channel) const { return numbers + 2 + channel * M; }
  Numbers outer_column(int channel) const { return numbers + 2 + (DIM - M) * M + channel * M_OUT; }
  void hold(uint w) {
    if (held == (int)w) return;
    held = (int)w;
    for (int i = 0; i < 4; ++i) {
      main[i] = numbers[0] * norm(0, 4 * held + i);
      outer[i] = numbers[1] * norm(128, 4 * held + i);
    }
  }
  void load(int m, uint w) {
    hold(w);
    row = m < M;
    if (row) {
      signs = signs_of(m);
      return;
    }
    const int channel = m - M;
    for (int i = 0; i < 4; ++i) own[i] = 0.0f;
    if (!is_outlier(channel)) return;
    add(0, M, main_column(channel), main, -1.0f);
    add(M, M_OUT, outer_column(channel), outer, 1.0f);
  }
  void token(uint i) { at = (int)i; }
  float value(int) const {
    if (row) return (signs >> at) & 1u ? main[at] : -main[at];
    return own[at];
  }
  void factors(uint, VQ_THREAD float* to) const { all_ones(to); }
};

// score_tokens (metal_pieces.h): every row of signs is read once for up to eight outliers, the main
// sketch's scores among them.
template <int ROWS, int DIM, int M, int M_OUT, int OUTLIERS, int FIXED, class Bytes, class Numbers,
          class Q>
VQ_FN void score_tokens(VQ_THREAD OutlierTile<DIM, M, M_OUT, OUTLIERS, FIXED, Bytes, Numbers>& keys,
                        Q q, uint word, int side, VQ_THREAD float (*score)[4]) {
  const int TOGETHER = OUTLIERS < 8 ? OUTLIERS : 8, CHANNELS = DIM - M;
  keys.hold(word);
  for (int from = 0; from < OUTLIERS; from += TOGETHER) {
    int channel[TOGETHER];
    float sums[TOGETHER][4];
    for (int k = 0; k < TOGETHER; ++k) {
      channel[k] = from + k < OUTLIERS ? keys.outlier(from + k) : CHANNELS;
      for (int i = 0; i < 4; ++i) sums[k][i] = 0.0f;
    }
    for (int sketch = 0; sketch < 2; ++sketch) {
      const int n = sketch == 0 ? M : M_OUT;
      for (int j = side; j < n; j += 2) {
        const uint32_t signs = keys.signs_of(sketch == 0 ? j : M + j);
        for (int i = 0; sketch == 0 && from == 0 && i < 4; ++i) {
          const float y = (signs >> i) & 1u ? keys.main[i] : -keys.main[i];
          for (int r = 0; r < ROWS; ++r) score[r][i] = fma(q[r * DIM + j], y, score[r][i]);
        }
        for (int k = 0; k < TOGETHER; ++k) {
          const int c = min(channel[k], CHANNELS - 1);
          const float x = sketch == 0 ? keys.main_column(c)[j] : keys.outer_column(c)[j];
          for (int i = 0; i < 4; ++i) sums[k][i] += (signs >> i) & 1u ? x : -x;
        }
      }
      for (int k = 0; k < TOGETHER; ++k) {
        for (int i = 0; i < 4; ++i) {
          // What the main sketch says of the channel is taken back, the outliers' is added.
          const float y = sums[k][i] * (sketch == 0 ? -keys.main[i] : keys.outer[i]);
          sums[k][i] = 0.0f;
          if (channel[k] >= CHANNELS) continue;
          for (int r = 0; r < ROWS; ++r) {
            score[r][i] = fma(q[r * DIM + M + channel[k]], y, score[r][i]);
          }
        }
      }
    }
  }
}

}  // namespace veloxquant
