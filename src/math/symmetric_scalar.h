// Symmetric scalar quantisers of up to 4 bits (src/codecs/turboquant): what decides a code and a
// stored scalar. 0 bits is the quantiser that says 0.
//
// level: the 2^(bits-1) positive levels, ascending. boundary[k], k >= 1: midpoint below level[k].
#pragma once

#include "src/math/float16.h"
#include "src/math/portable.h"

namespace veloxquant {

// Codes ascend with the value. A value on a boundary takes the level farther from 0; -0 counts as
// +0; NaN takes the smallest negative level.
template <class Boundaries>
VQ_FN uint32_t symmetric_code(Boundaries boundary, int bits, float u) {
  if (bits == 0) return 0u;
  const uint32_t half_count = 1u << (bits - 1);
  const float magnitude = float_of(bits_of(u) & 0x7fffffffu);
  uint32_t k = 0u;
  for (uint32_t i = 1u; i < half_count; ++i) k += magnitude >= boundary[i] ? 1u : 0u;
  return u >= 0.0f ? half_count + k : half_count - 1u - k;
}

template <class Levels>
VQ_FN float symmetric_level(Levels level, int bits, uint32_t code) {
  if (bits == 0) return 0.0f;
  const uint32_t half_count = 1u << (bits - 1);
  return code >= half_count ? level[code - half_count] : -level[half_count - 1u - code];
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

// sqrt(pi / 2), of the scalar of the `prod` form's signs.
VQ_CONSTANT float kSketchFactor = 1.25331413731550025f;

}  // namespace veloxquant
