// Between dimensions [head_dim][64] and planes [2][pairs][64], in the order of Rope::pairs().
#pragma once

#include "src/math/portable.h"
#include "veloxquant/codec.h"
#include "veloxquant/rope.h"

namespace veloxquant::commvq {

// planes[j] = weight[j] * the dimensions of pair j.
inline void to_planes(const Rope& rope, const float* weight, const float* tile, float* planes) {
  const int64_t n_pairs = static_cast<int64_t>(rope.pairs().size());
  for (int64_t j = 0; j < n_pairs; ++j) {
    const float* first = tile + int64_t{rope.pairs()[j].first} * kBlockTokens;
    const float* second = tile + int64_t{rope.pairs()[j].second} * kBlockTokens;
    float* x = planes + j * kBlockTokens;
    float* y = x + n_pairs * kBlockTokens;
    for (int t = 0; t < kBlockTokens; ++t) {
      x[t] = mul(first[t], weight[j]);
      y[t] = mul(second[t], weight[j]);
    }
  }
}

inline void from_planes(const Rope& rope, const float* inverse_weight, const float* planes,
                        float* tile) {
  const int64_t n_pairs = static_cast<int64_t>(rope.pairs().size());
  for (int64_t j = 0; j < n_pairs; ++j) {
    float* first = tile + int64_t{rope.pairs()[j].first} * kBlockTokens;
    float* second = tile + int64_t{rope.pairs()[j].second} * kBlockTokens;
    const float* x = planes + j * kBlockTokens;
    const float* y = x + n_pairs * kBlockTokens;
    for (int t = 0; t < kBlockTokens; ++t) {
      first[t] = mul(x[t], inverse_weight[j]);
      second[t] = mul(y[t], inverse_weight[j]);
    }
  }
}

}  // namespace veloxquant::commvq
