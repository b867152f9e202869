// The packed block of RaBitQ, drawn in README.md: planes of codes, then one fp16 scalar a token.
#pragma once

#include "src/codecs/rabitq/levels.h"

namespace veloxquant::rabitq {

constexpr int kMaxHeadDim = 1024;
constexpr int kScalarBytes = 2 * kBlockTokens;

struct BlockLayout {
  int head_dim;
  int bits;

  int64_t scalars_at() const { return plane_bytes(head_dim, bits); }
  int64_t bytes() const { return scalars_at() + kScalarBytes; }
};

// fp16 scalars of a block or a token, little-endian. Not finite: stored as the largest finite
// value, NaN as 0; so that nothing a block holds can turn an attention output into NaN.
void store_scalars(const float* values, int n, uint8_t* bytes);
void load_scalars(const uint8_t* bytes, int n, float* values);

}  // namespace veloxquant::rabitq
