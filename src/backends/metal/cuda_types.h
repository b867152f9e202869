// What the kernels' text needs of CUDA's headers, for NVRTC where no toolkit is installed: fixed
// widths, 16-bit floats that are only stored and widened, arrays by value. In front of
// cuda_prelude.h; MLX brings CUDA's own headers instead. Never compiled by anything else.
#pragma once

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef int int32_t;
typedef long long int64_t;

// The kernels compute in fp32; these are how numbers lie in memory.
struct __half {
  unsigned short bits;
  __device__ __forceinline__ operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
};
typedef __half half;

struct __nv_bfloat16 {
  unsigned short bits;
  __device__ __forceinline__ operator float() const {
    return __uint_as_float((unsigned int)bits << 16);
  }
};

// A small array that travels with the launch.
template <class T, int N>
struct VqNumbers {
  T of[N];
  __device__ __forceinline__ const T& operator[](int i) const { return of[i]; }
};
