// What the kernel's stages share: elements, pairs, sums over a warp. Logarithms and exponentials
// are to base 2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "src/attention/cuda_fragments.cuh"
#include "src/attention/cuda_plan.h"
#include "src/math/hadamard.h"

namespace veloxquant::attention::cuda {

using ptx::let_next_start;
using ptx::reciprocal;
using ptx::wait_for_stream;

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kNothing = -1e30f;  // the maximum of no scores; finite, so that differences are

// Elements at, at + 1; `at` even.
__device__ __forceinline__ float2 load_pair(const void* data, int64_t at, int type) {
  if (type == 0) return *reinterpret_cast<const float2*>(static_cast<const float*>(data) + at);
  const uint32_t word = *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(data) + at);
  if (type == 1) return __half22float2(*reinterpret_cast<const __half2*>(&word));
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
__device__ __forceinline__ void store_pair(void* data, int64_t at, int type, float2 x) {
  if (type == 0) {
    *reinterpret_cast<float2*>(static_cast<float*>(data) + at) = x;
  } else if (type == 1) {
    *reinterpret_cast<__half2*>(static_cast<__half*>(data) + at) = __float22half2_rn(x);
  } else {
    *reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(data) + at) =
        __float22bfloat162_rn(x);
  }
}

// Two numbers as 16 bits each, and back.
template <bool kBf16>
__device__ __forceinline__ uint32_t pack_16(float a, float b) {
  if constexpr (kBf16) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&x);
  } else {
    const __half2 x = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&x);
  }
}
template <bool kBf16>
__device__ __forceinline__ float2 unpack_16(uint32_t x) {
  if constexpr (kBf16)
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
  return __half22float2(*reinterpret_cast<const __half2*>(&x));
}

// 2^e, e within +-126.
__device__ __forceinline__ float power_of_two(int e) {
  return __uint_as_float(static_cast<uint32_t>(e + 127) << 23);
}
// e such that x / 2^e is in [1, 2), held within +-100; 0 for 0.
__device__ __forceinline__ int exponent_of(float x) {
  return x > 0.0f ? min(max(static_cast<int>(__float_as_uint(x) >> 23) - 127, -100), 100) : 0;
}

// a / b, rounded down, for a >= 0, b >= 1 and quotients below 2^20: a third of the instructions of
// an integer division.
__device__ __forceinline__ int quotient(int a, int b) {
  const int q = static_cast<int>(static_cast<float>(a) * reciprocal(static_cast<float>(b)));
  const int rest = a - q * b;
  return rest < 0 ? q - 1 : rest >= b ? q + 1 : q;
}
// By a shuffle, so that the compiler knows it to be the same in the whole warp: branches that might
// divide it wait for whatever is on its way.
__device__ __forceinline__ int same_in_warp(int x) { return __shfl_sync(0xffffffffu, x, 0); }
// The first of the items of CTA c of n.
__device__ __forceinline__ int first_item(int items, int c, int n) {
  return same_in_warp(quotient(items * c, n));
}

__device__ __forceinline__ float warp_largest(float x) {
#pragma unroll
  for (int step = 16; step >= 1; step >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

__device__ __forceinline__ void add_scaled(float4& sum, float factor, float4 x) {
  sum.x = fmaf(factor, x.x, sum.x);
  sum.y = fmaf(factor, x.y, sum.y);
  sum.z = fmaf(factor, x.z, sum.z);
  sum.w = fmaf(factor, x.w, sum.w);
}

__device__ __forceinline__ void add_scaled(float2& sum, float factor, float2 x) {
  sum.x = fmaf(factor, x.x, sum.x);
  sum.y = fmaf(factor, x.y, sum.y);
}
__device__ __forceinline__ float2 scaled(float factor, float2 x) {
  return make_float2(factor * x.x, factor * x.y);
}
__device__ __forceinline__ float4 scaled(float factor, float4 x) {
  return make_float4(factor * x.x, factor * x.y, factor * x.z, factor * x.w);
}

// Which part of the problem a CTA is at.
struct Pair {
  int index, sequence, kv_head, first_head, n_heads;
};

// n_groups is 1 or 2.
__device__ __forceinline__ int kv_head_of(const DecodeParams& p, int head_group) {
  return head_group >> (p.n_groups - 1);
}

__device__ __forceinline__ Pair pair_of(const DecodeParams& p, int head_group, int sequence) {
  Pair pair;
  pair.index = head_group * p.batch + sequence;
  pair.sequence = sequence;
  pair.kv_head = kv_head_of(p, head_group);
  const int in_group = (head_group - pair.kv_head * p.n_groups) * p.heads_per_group;
  pair.first_head = pair.kv_head * p.group + in_group;
  pair.n_heads = min(p.heads_per_group, p.group - in_group);
  return pair;
}

}  // namespace veloxquant::attention::cuda
