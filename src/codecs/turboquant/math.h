// Element arithmetic of the scalar codecs: what decides a code and a stored scalar.
//
// Everything is in units where a coordinate of a token has variance 1: u = y sqrt(D) / |k|.
#pragma once

#include <math.h>

#include "src/math/float16.h"
#include "src/math/lloyd_max_tables.h"
#include "src/math/portable.h"

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

// Codes ascend with the value. A value on a boundary takes the level farther from 0; -0 counts as
// +0; NaN takes the smallest negative level.
VQ_FN uint32_t scalar_code(const ScalarQuantizer& quantizer, float u) {
  if (quantizer.bits == 0) return 0;
  const uint32_t half = 1u << (quantizer.bits - 1);
  const float magnitude = float_of(bits_of(u) & 0x7fffffffu);
  uint32_t k = 0;
  for (uint32_t i = 1; i < half; ++i) k += magnitude >= quantizer.boundary[i] ? 1u : 0u;
  return u >= 0.0f ? half + k : half - 1u - k;
}

VQ_FN float scalar_level(const ScalarQuantizer& quantizer, uint32_t code) {
  if (quantizer.bits == 0) return 0.0f;
  const uint32_t half = 1u << (quantizer.bits - 1);
  return code >= half ? quantizer.level[code - half] : -quantizer.level[half - 1u - code];
}

// sqrt(D) / |k|, or 0 for a token that is 0 (or whose squares underflow or overflow).
VQ_FN float unit_factor(float norm, float root_dim) {
  const bool usable = norm > 0.0f && is_finite_bits(bits_of(norm));
  return usable ? root_dim / norm : 0.0f;
}

// The stored scalar: finite, rounded to fp16; attention uses the rounded one.
VQ_FN uint16_t stored_scalar(float numerator, float denominator) {
  if (!(denominator > 0.0f) || !(numerator > 0.0f)) return 0;
  const float value = numerator / denominator;
  return value < 65504.0f ? f32_to_f16(value) : (uint16_t)0x7bffu;
}

}  // namespace veloxquant
