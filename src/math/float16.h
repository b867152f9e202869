// fp32 <-> fp16 and bf16 by integer steps: round to nearest, ties to even, on every machine alike.
#pragma once

#include "src/math/portable.h"

namespace veloxquant {

VQ_FN float f16_to_f32(uint16_t bits) {
  uint32_t sign = (uint32_t)(bits & 0x8000u) << 16;
  uint32_t exponent = (bits >> 10) & 0x1fu;
  uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 31u) return float_of(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0u) return float_of(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  if (mantissa == 0u) return float_of(sign);
  // Subnormal: mantissa * 2^-24, exact in fp32.
  float magnitude = mul((float)mantissa, 5.9604644775390625e-8f);
  return float_of(sign | bits_of(magnitude));
}

VQ_FN uint16_t f32_to_f16(float value) {
  uint32_t bits = bits_of(value);
  uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {                                    // subnormal in fp16
    if (magnitude < 0x33000000u) return (uint16_t)sign;             // below half the smallest
    uint32_t shift = 126u - (magnitude >> 23);                      // 14 .. 24
    uint32_t full = (magnitude & 0x7fffffu) | 0x800000u;
    uint32_t kept = full >> shift;
    uint32_t rest = full & ((1u << shift) - 1u);
    uint32_t middle = 1u << (shift - 1u);
    kept += (rest > middle || (rest == middle && (kept & 1u))) ? 1u : 0u;
    return (uint16_t)(sign | kept);
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

VQ_FN float bf16_to_f32(uint16_t bits) { return float_of((uint32_t)bits << 16); }

VQ_FN uint16_t f32_to_bf16(float value) {
  uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);  // quiet NaN
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace veloxquant
