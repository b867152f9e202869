// The scalar of a token: the root mean square of its coordinates, in fp16.
#pragma once

#include <cmath>

#include "src/math/float16.h"

namespace veloxquant::commvq {

// Large tokens saturate: a cache never holds infinities.
inline uint16_t rounded_rms(float sum_of_squares, int dims) {
  constexpr float kLargest = 65504.0f;
  const float rms = std::sqrt(sum_of_squares / static_cast<float>(dims));
  return f32_to_f16(rms < kLargest ? rms : kLargest);
}

// What normalises the token: of the rounded rms, which is what decoding multiplies with. 0 where
// there is nothing to encode.
inline float inverse_rms(float sum_of_squares, uint16_t rms) {
  if (rms == 0 || !is_finite_bits(bits_of(sum_of_squares))) return 0.0f;
  return 1.0f / f16_to_f32(rms);
}

}  // namespace veloxquant::commvq
