// Integer levels of rotated tokens (src/codecs/rabitq): a code u of B bits stands for the level
// z = 2 u - (2^B - 1). Element arithmetic that decides codes and sums; sums run in ascending order.
#pragma once

#include "src/math/portable.h"
#include "src/math/square_root.h"

namespace veloxquant {

// The search for the step of the levels (src/codecs/rabitq/README.md). The step of a token is its
// root mean square times 1 / (kInverseStep[bits] * kStepFactors[k]).
VQ_CONSTANT int kStepTrials = 9;
VQ_CONSTANT float kInverseStep[5] = {0.0f, 0.0f, 1.0043186f, 1.7064846f, 2.9832935f};
VQ_CONSTANT float kStepFactors[9] = {0.84f, 0.89f, 0.94f, 0.99f, 1.04f, 1.09f, 1.14f, 1.19f, 1.24f};

// 1 / rms of a token with sum of squares `squares`; 0 for a token of zeros.
VQ_FN float inverse_rms(float squares, float inverse_rows) {
  if (!(squares > 0.0f)) return 0.0f;
  return 1.0f / square_root(mul(squares, inverse_rows));
}

// The number of whole steps in |y|, at most `most`; the level's magnitude is 2 steps + 1.
VQ_FN int whole_steps(float magnitude, float inverse_step, float most) {
  float steps = mul(magnitude, inverse_step);
  return (int)(steps < most ? steps : most);
}

// -0 counts as +0.
VQ_FN uint32_t level_code(float y, int bits, float inverse_step) {
  const int middle = 1 << (bits - 1);
  const float magnitude = float_of(bits_of(y) & 0x7fffffffu);
  const int steps = whole_steps(magnitude, inverse_step, (float)(middle - 1));
  return (uint32_t)(y >= 0.0f ? middle + steps : middle - 1 - steps);
}

struct LevelSums {
  float squares, dots, levels;  // sum y^2, sum y z, sum z^2
};

// Sums of one token at one step; y_r is y[r * stride].
template <class Y>
VQ_FN LevelSums level_sums(Y y, int stride, int rows, int bits, float inverse_step) {
  const float most = (float)((1 << (bits - 1)) - 1);
  LevelSums sums;
  sums.squares = sums.dots = sums.levels = 0.0f;
  for (int r = 0; r < rows; ++r) {
    const float value = y[r * stride];
    const float magnitude = float_of(bits_of(value) & 0x7fffffffu);
    const float level = (float)(2 * whole_steps(magnitude, inverse_step, most) + 1);
    sums.squares = sums.squares + mul(value, value);
    sums.dots = sums.dots + mul(magnitude, level);
    sums.levels = sums.levels + mul(level, level);
  }
  return sums;
}

// The scalar of a token: 0 unbiased, 1 least squared error, 2 the token's norm.
VQ_FN float level_scalar(int scale, float squares, float dots, float levels) {
  if (!(dots > 0.0f)) return 0.0f;  // a token of zeros
  if (scale == 0) return squares / dots;
  if (scale == 1) return dots / levels;
  return square_root(squares / levels);
}

}  // namespace veloxquant
