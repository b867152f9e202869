// The correctly rounded square root, under one name for CPU, CUDA and Metal.
#pragma once

#include <math.h>

#include "src/math/portable.h"

namespace veloxquant {

VQ_FN float square_root(float x) {
#if defined(__METAL_VERSION__)
  return sqrt(x);  // math_mode(safe) of portable.h: rounded as IEEE 754 asks
#elif defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return ::sqrtf(x);
#endif
}

}  // namespace veloxquant
