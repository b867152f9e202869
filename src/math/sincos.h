// Sine and cosine in double by steps that every machine rounds alike. libm differs between systems
// in the last bit, and these decide stored bits (rotary embeddings, src/codecs/rope).
#pragma once

#include "src/math/portable.h"

namespace veloxquant {

// Rounded once, never fused with a following addition.
VQ_FN double mul(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// pi/2 in three parts: 29 bits, the next 29, the rest. n * kHalfPi1 and n * kHalfPi2 are exact for
// |n| < 2^24.
constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;
constexpr double kHalfPi1 = 0x1.921fb54p+0;
constexpr double kHalfPi2 = 0x1.10b4611p-30;
constexpr double kHalfPi3 = 0x1.4c4c6628b80dcp-59;
// x + kRoundDouble - kRoundDouble is x rounded to an integer, to even; the integer is in the low
// bits.
constexpr double kRoundDouble = 0x1.8p+52;

// Minimax polynomials on [-pi/4, pi/4] (the coefficients are those of fdlibm, Sun Microsystems
// 1993).
constexpr double kSin[6] = {-1.66666666666666324348e-01, 8.33333333332248946124e-03,
                            -1.98412698298579493134e-04, 2.75573137070700676789e-06,
                            -2.50507602534068634195e-08, 1.58969099521155010221e-10};
constexpr double kCos[6] = {4.16666666666666019037e-02, -1.38888888888741095749e-03,
                            2.48015872894767294178e-05, -2.75573143513906633035e-07,
                            2.08757232129817482790e-09, -1.13596475577881948265e-11};

// Angles from here on are 2 apart in fp32 and carry no phase: they count as 0, and so does NaN.
constexpr float kMaxAngle = 16777216.0f;

VQ_FN void sincos(float angle, double* sine, double* cosine) {
  const double x = angle < kMaxAngle && angle > -kMaxAngle ? (double)angle : 0.0;
  const double shifted = mul(x, kTwoOverPi) + kRoundDouble;
  const double n = shifted - kRoundDouble;
  const double r = ((x - mul(n, kHalfPi1)) - mul(n, kHalfPi2)) - mul(n, kHalfPi3);
  const double z = mul(r, r);
  double s = kSin[5], c = kCos[5];
  for (int i = 4; i >= 0; --i) {
    s = mul(s, z) + kSin[i];
    c = mul(c, z) + kCos[i];
  }
  s = r + mul(mul(r, z), s);
  c = (1.0 - mul(0.5, z)) + mul(mul(z, z), c);
  union {
    double d;
    uint64_t u;
  } both;
  both.d = shifted;
  const uint64_t quadrant = both.u & 3u;
  const double a = quadrant & 1u ? c : s;
  const double b = quadrant & 1u ? s : c;
  *sine = quadrant & 2u ? -a : a;
  *cosine = quadrant == 1u || quadrant == 2u ? -b : b;
}

}  // namespace veloxquant
