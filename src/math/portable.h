// The only file that knows which language it is compiled as.
#pragma once

#if defined(__METAL_VERSION__)
// Metal's compiler fuses a * b + c unless told otherwise, and its flags do not reach this text.
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
#elif defined(__FAST_MATH__)
#error "VeloxQuant's codes are exact: -ffast-math is not supported"
#endif

#include <stdint.h>

#if defined(__CUDACC__)
#define VQ_FN static __host__ __device__ __forceinline__
#else
#define VQ_FN static inline
#endif

// Metal has no pointer without an address space: functions take pointers by template parameter, or
// name a thread's own variables with VQ_THREAD; constants of a file are VQ_CONSTANT.
#if defined(__METAL_VERSION__)
#define VQ_THREAD thread
#define VQ_CONSTANT static constexpr constant
#else
#define VQ_THREAD
#define VQ_CONSTANT constexpr
#endif

namespace veloxquant {

// Rounded once, never fused with a following addition.
VQ_FN float mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

#if defined(__METAL_VERSION__)
VQ_FN uint32_t bits_of(float x) { return as_type<uint32_t>(x); }
VQ_FN float float_of(uint32_t bits) { return as_type<float>(bits); }
#else
VQ_FN uint32_t bits_of(float x) {
  union {
    float f;
    uint32_t u;
  } both;
  both.f = x;
  return both.u;
}

VQ_FN float float_of(uint32_t bits) {
  union {
    uint32_t u;
    float f;
  } both;
  both.u = bits;
  return both.f;
}
#endif

VQ_FN bool is_finite_bits(uint32_t bits) { return (bits & 0x7f800000u) != 0x7f800000u; }

}  // namespace veloxquant
