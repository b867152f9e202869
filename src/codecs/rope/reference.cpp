// The executable specification of rotary embeddings.
#include "src/codecs/rope/kernels.h"
#include "src/math/sincos.h"

namespace veloxquant::rope {
namespace {

void tables(const float* inv_freq, int n_pairs, const float* scaled, double factor, float* cosines,
            float* sines) {
  for (int j = 0; j < n_pairs; ++j) {
    for (int t = 0; t < kTokens; ++t) {
      double sine, cosine;
      sincos(mul(scaled[t], inv_freq[j]), &sine, &cosine);
      cosines[j * kTokens + t] = static_cast<float>(mul(factor, cosine));
      sines[j * kTokens + t] = static_cast<float>(mul(factor, sine));
    }
  }
}

void turn(const RopePair* pairs, int n_pairs, RopeDirection direction, const float* cosines,
          const float* sines, float* x_t) {
  for (int j = 0; j < n_pairs; ++j) {
    float* first = x_t + pairs[j].first * kTokens;
    float* second = x_t + pairs[j].second * kTokens;
    for (int t = 0; t < kTokens; ++t) {
      const float c = cosines[j * kTokens + t], s = sines[j * kTokens + t];
      const float a = first[t], b = second[t];
      if (direction == RopeDirection::forward) {
        first[t] = mul(a, c) - mul(b, s);
        second[t] = mul(a, s) + mul(b, c);
      } else {
        first[t] = mul(a, c) + mul(b, s);
        second[t] = mul(b, c) - mul(a, s);
      }
    }
  }
}

}  // namespace

const Kernels& reference_kernels() {
  static const Kernels kernels{tables, turn};
  return kernels;
}

}  // namespace veloxquant::rope
