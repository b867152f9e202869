// The quantisers of the scalar codecs; what decides a code and a stored scalar is in
// src/math/symmetric_scalar.h.
//
// Everything is in units where a coordinate of a token has variance 1: u = y sqrt(D) / |k|.
#pragma once

#include <math.h>

#include "src/math/lloyd_max_tables.h"
#include "src/math/symmetric_scalar.h"

namespace veloxquant {

// A symmetric scalar quantiser of up to 4 bits; 0 bits is the quantiser that says 0.
struct ScalarQuantizer {
  int bits = 0;
  float level[8] = {};     // positive levels, ascending
  float boundary[8] = {};  // [1..]: midpoints below level[k]; [0] is 0
};

VQ_FN ScalarQuantizer scalar_quantizer(const float* positive_levels, int bits) {
  ScalarQuantizer quantizer;
  quantizer.bits = bits;
  const int half = bits == 0 ? 0 : 1 << (bits - 1);
  for (int k = 0; k < half; ++k) {
    quantizer.level[k] = positive_levels[k];
    if (k > 0) {
      quantizer.boundary[k] = mul(0.5f, positive_levels[k - 1] + positive_levels[k]);
    }
  }
  return quantizer;
}

VQ_FN uint32_t scalar_code(const ScalarQuantizer& quantizer, float u) {
  return symmetric_code(quantizer.boundary, quantizer.bits, u);
}

VQ_FN float scalar_level(const ScalarQuantizer& quantizer, uint32_t code) {
  return symmetric_level(quantizer.level, quantizer.bits, code);
}

}  // namespace veloxquant
