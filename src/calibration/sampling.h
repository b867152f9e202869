// Which tokens a fit sees.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "src/calibration/float_rows.h"
#include "src/calibration/random.h"

namespace veloxquant {

// At most `most` of [0, n), ascending: one at random from each of `most` equal ranges. Evenly
// spaced picks would resonate with whatever is periodic in the text.
inline std::vector<int64_t> subsample(int64_t n, int64_t most, SplitMix64 random) {
  const int64_t count = std::min(n, most);
  std::vector<int64_t> picks(count);
  for (int64_t i = 0; i < count; ++i) {
    // floor(i * n / count) without the product, which could overflow.
    const auto start = [&](int64_t k) { return k * (n / count) + k * (n % count) / count; };
    picks[i] = start(i) + random.index(start(i + 1) - start(i));
  }
  return picks;
}

// The tokens of a head whose values are all finite.
inline std::vector<int64_t> finite_tokens(const TensorView& x, int64_t head) {
  std::vector<int64_t> tokens;
  std::vector<float> row(x.shape[2]);
  for (int64_t t = 0; t < x.shape[1]; ++t) {
    read_row(x, head, t, row.data());
    if (std::all_of(row.begin(), row.end(), [](float v) { return std::isfinite(v); })) {
      tokens.push_back(t);
    }
  }
  return tokens;
}

}  // namespace veloxquant
