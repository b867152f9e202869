// Rotary position embeddings as codecs of pre-RoPE keys undo and redo them. The tables of cosines
// and sines are part of the format; src/codecs/rope/README.md states the formula.
#pragma once

#include <cstdint>
#include <vector>

#include "veloxquant/backend.h"

namespace veloxquant {

struct RopeSpec {
  int head_dim = 0;
  // Radians per position of each rotated pair; the first 2 * inv_freq.size() dimensions rotate.
  std::vector<float> inv_freq;
  bool traditional = false;    // pairs (2j, 2j + 1); else (j, j + rotary_dims / 2)
  float position_scale = 1;    // linear scaling: the angle is position_scale * position * inv_freq
  float attention_factor = 1;  // the rotated dimensions are multiplied by it (YaRN, longrope)

  int rotary_dims() const { return 2 * static_cast<int>(inv_freq.size()); }
};

enum class RopeDirection { forward, inverse };

// The two dimensions of a pair.
struct RopePair {
  int first, second;
};

class Rope {
 public:
  // Throws Error for an odd head_dim, more rotary dimensions than head_dim, or numbers that are
  // not finite.
  explicit Rope(RopeSpec spec);

  const RopeSpec& spec() const { return spec_; }
  // All head_dim / 2 pairs: those that rotate, then the neighbours of what stays as it is.
  const std::vector<RopePair>& pairs() const { return pairs_; }

  // In place on x_t: fp32 [head_dim][64], dimension-major. Token t is at position first + t.
  void turn_tile(Backend backend, RopeDirection direction, int64_t first, float* x_t) const;

  // In place on n rows of fp32 [n][row_stride]; row i is at positions[i] (negative turns back).
  void turn_rows(Backend backend, RopeDirection direction, const int64_t* positions, int64_t n,
                 float* rows, int64_t row_stride) const;

  // cos and sin, times the attention factor (inverse: divided by it): fp32 [rotating pairs][64].
  void tables(Backend backend, RopeDirection direction, const int64_t* positions, float* cosines,
              float* sines) const;

 private:
  RopeSpec spec_;
  std::vector<RopePair> pairs_;
};

}  // namespace veloxquant
