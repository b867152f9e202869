// What the kernels' text uses of Metal, for NVRTC: put in front of the same text, behind the
// headers that MLX includes itself (cuda_fp16.h, cuda_bf16.h). Never compiled by anything else.
//
// A simdgroup is a warp of 32. Attributes such as thread_position_in_grid are variables that
// cuda_text.cpp writes at the start of the body. Products of encode are rounded by mul()
// (src/math/portable.h), so that NVRTC's fused multiply-adds, which MLX cannot turn off, change no
// bit of a code.
#pragma once

// Address spaces: CUDA's pointers have none; variables of a threadgroup are shared memory, aligned
// so that neighbours may be loaded at once.
#define device
#define constant
#define thread
#define threadgroup __shared__ __align__(16)

// NVRTC knows no host; src/math says __host__ __device__.
#undef __host__
#define __host__

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef __nv_bfloat16 bfloat;
typedef __half float16_t;
typedef __nv_bfloat16 bfloat16_t;

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f

template <class To, class From>
__device__ __forceinline__ To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
__device__ __forceinline__ void threadgroup_barrier(mem_flags) { __syncthreads(); }
__device__ __forceinline__ void simdgroup_barrier(mem_flags) { __syncwarp(); }

template <class T>
__device__ __forceinline__ T simd_shuffle_xor(T x, ushort mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <class T>
__device__ __forceinline__ T simd_shuffle(T x, ushort lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
template <class T>
__device__ __forceinline__ T simd_broadcast(T x, ushort lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
template <class T>
__device__ __forceinline__ T simd_shuffle_down(T x, ushort delta) {
  return __shfl_down_sync(0xffffffffu, x, delta);
}
template <class T>
__device__ __forceinline__ T simd_shuffle_up(T x, ushort delta) {
  return __shfl_up_sync(0xffffffffu, x, delta);
}
template <class T>
__device__ __forceinline__ T simd_sum(T x) {
  for (int width = 16; width > 0; width /= 2) x = x + __shfl_xor_sync(0xffffffffu, x, width);
  return x;
}
template <class T>
__device__ __forceinline__ T simd_max(T x) {
  for (int width = 16; width > 0; width /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, width));
  return x;
}
template <class T>
__device__ __forceinline__ T simd_min(T x) {
  for (int width = 16; width > 0; width /= 2) x = min(x, __shfl_xor_sync(0xffffffffu, x, width));
  return x;
}
__device__ __forceinline__ bool simd_all(bool x) { return __all_sync(0xffffffffu, x) != 0; }
__device__ __forceinline__ bool simd_any(bool x) { return __any_sync(0xffffffffu, x) != 0; }

__device__ __forceinline__ uint popcount(uint x) { return (uint)__popc(x); }
__device__ __forceinline__ uint clz(uint x) { return (uint)__clz((int)x); }
__device__ __forceinline__ uint ctz(uint x) { return x == 0 ? 32u : (uint)__ffs((int)x) - 1u; }
template <class T>
__device__ __forceinline__ T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <class T>
__device__ __forceinline__ T select(T a, T b, bool c) {
  return c ? b : a;
}
