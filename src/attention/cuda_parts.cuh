// What the kernels share: elements, pairs, and the merge of a CTA's warps into a partial result.
// Logarithms and exponentials are to base 2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "src/attention/cuda_fragments.cuh"
#include "src/attention/cuda_plan.h"
#include "src/math/hadamard.h"

namespace veloxquant::attention::cuda {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kNothing = -1e30f;  // the maximum of no scores; finite, so that differences are

__device__ __forceinline__ float load_element(const void* data, int64_t at, int type) {
  if (type == 0) return static_cast<const float*>(data)[at];
  if (type == 1) return __half2float(static_cast<const __half*>(data)[at]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
}
__device__ __forceinline__ void store_element(void* data, int64_t at, int type, float x) {
  if (type == 0) {
    static_cast<float*>(data)[at] = x;
  } else if (type == 1) {
    static_cast<__half*>(data)[at] = __float2half_rn(x);
  } else {
    static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(x);
  }
}
__device__ __forceinline__ float2 load_pair(const uint16_t* at, int bf16) {
  const uint32_t word = *reinterpret_cast<const uint32_t*>(at);
  if (bf16) return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

// 2^e, e within +-126.
__device__ __forceinline__ float power_of_two(int e) {
  return __uint_as_float(static_cast<uint32_t>(e + 127) << 23);
}
// e such that x / 2^e is in [1, 2), held within +-100; 0 for 0.
__device__ __forceinline__ int exponent_of(float x) {
  return x > 0.0f ? min(max(static_cast<int>(__float_as_uint(x) >> 23) - 127, -100), 100) : 0;
}

// The kernel ahead, which prepares the queries, has ended and its writes are seen.
__device__ __forceinline__ void wait_for_queries() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Which part of the problem a CTA is at.
struct Pair {
  int index, sequence, kv_head, first_head, n_heads;
};

__device__ __forceinline__ Pair pair_of(const DecodeParams& p, int head_group, int sequence) {
  Pair pair;
  pair.index = head_group * p.batch + sequence;
  pair.sequence = sequence;
  pair.kv_head = head_group / p.n_groups;
  const int in_group = head_group % p.n_groups * p.heads_per_group;
  pair.first_head = pair.kv_head * p.group + in_group;
  pair.n_heads = min(p.heads_per_group, p.group - in_group);
  return pair;
}

// Shared memory of the merges. warps: [WARPS][HEADS][D]; maximum and sum: [WARPS][HEADS].
template <int HEADS, int WARPS>
struct MergeSpace {
  static constexpr int kThreads = 32 * WARPS;
  float* warps;
  float* maximum;
  float* sum;
};

// Writes the warps' partial results, one after the other in warp order, as one: out[HEADS][D], then
// maximum and sum of each head. All threads; the space is free again after it.
template <int HEADS, int WARPS>
__device__ __forceinline__ void merge_warps(const MergeSpace<HEADS, WARPS>& space, int head_dim,
                                            float unit, float* to) {
  __syncthreads();
  const int pairs = head_dim / 2;
#pragma unroll 1
  for (int e = threadIdx.x; e < HEADS * pairs; e += 32 * WARPS) {
    const int h = e / pairs;
    float top = kNothing;
#pragma unroll 4
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, space.maximum[w * HEADS + h]);
    float2 total = make_float2(0.0f, 0.0f);
    float sum = 0.0f;
#pragma unroll 4
    for (int w = 0; w < WARPS; ++w) {
      const float weight = exp2_fast(space.maximum[w * HEADS + h] - top) * unit;
      const float2 x = reinterpret_cast<const float2*>(space.warps)[w * HEADS * pairs + e];
      total.x = fmaf(weight, x.x, total.x);
      total.y = fmaf(weight, x.y, total.y);
      sum = fmaf(weight, space.sum[w * HEADS + h], sum);
    }
    __stcg(reinterpret_cast<float2*>(to) + e, total);
    if (e == h * pairs) {
      __stcg(to + HEADS * head_dim + h, top);
      __stcg(to + HEADS * head_dim + HEADS + h, sum);
    }
  }
  __syncthreads();
}

}  // namespace veloxquant::attention::cuda
