// What functions make of numbers that are none.
#pragma once

#include "src/math/portable.h"

namespace veloxquant {

// NaN counts as 0, infinities as the largest fp16.
VQ_FN float finite_or_clamped(float x) {
  const uint32_t bits = bits_of(x);
  if (is_finite_bits(bits)) return x;
  if (bits & 0x7fffffu) return 0.0f;
  return bits >> 31 ? -65504.0f : 65504.0f;
}

// An infinity as a NaN.
VQ_FN float finite_or_nan(float x) {
  return is_finite_bits(bits_of(x)) ? x : float_of(0x7fc00000u);
}

}  // namespace veloxquant
