// What a backend implements for rotary embeddings; all give the same bits.
#pragma once

#include <cstdint>

#include "veloxquant/rope.h"

namespace veloxquant::rope {

constexpr int kTokens = 64;

// cosines[j][t] = fp32(factor * cos(angle)), sines likewise; angle = scaled[t] * inv_freq[j] in
// fp32. scaled: 64 positions, already times the position scale.
using Tables = void (*)(const float* inv_freq, int n_pairs, const float* scaled, double factor,
                        float* cosines, float* sines);

// (a, b) <- (a cos - b sin, a sin + b cos), or its transpose; x_t: [head_dim][64], in place.
using Turn = void (*)(const RopePair* pairs, int n_pairs, RopeDirection direction,
                      const float* cosines, const float* sines, float* x_t);

struct Kernels {
  Tables tables;
  Turn turn;
};

const Kernels& reference_kernels();
const Kernels& cpu_kernels();
inline const Kernels& kernels_of(Backend backend) {
  return backend == Backend::reference ? reference_kernels() : cpu_kernels();
}

}  // namespace veloxquant::rope
