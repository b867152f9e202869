// What surrounds the steps: the exact tokens, the merge of the warps, and the combination of the
// CTAs' partial results into the output. Logarithms and exponentials are to base 2.
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

constexpr int kInverseParts = 16;

// x[HEADS][D] in shared memory: codec coordinates -> original ones, with `other` of kInverseParts
// times the size as scratch. All threads.
template <int HEADS, int kThreads>
__device__ __forceinline__ void inverse_transform(const SideView& side, int kv_head, int head_dim,
                                                  float* x, float* other) {
  if (side.matrix != nullptr) {
    // A thread: four output dimensions, a part of the sum; 8 loads of the matrix in flight. Code
    // that runs once is paid for by its length (it is fetched from afar), so loops here are
    // unrolled no further.
    const float* matrix = side.matrix + static_cast<int64_t>(kv_head) * head_dim * head_dim;
    const int quads = head_dim / 4, parts = min(kThreads / quads, kInverseParts);
    const int quad = threadIdx.x % quads, part = threadIdx.x / quads;
    if (part < parts) {
      float4 y[HEADS];
#pragma unroll
      for (int h = 0; h < HEADS; ++h) y[h] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
      for (int j = part; j < head_dim; j += parts) {
        const float4 m = __ldg(
            reinterpret_cast<const float4*>(matrix + static_cast<int64_t>(j) * head_dim) + quad);
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
          const float xj = x[h * head_dim + j];
          y[h].x = fmaf(xj, m.x, y[h].x);
          y[h].y = fmaf(xj, m.y, y[h].y);
          y[h].z = fmaf(xj, m.z, y[h].z);
          y[h].w = fmaf(xj, m.w, y[h].w);
        }
      }
#pragma unroll
      for (int h = 0; h < HEADS; ++h)
        reinterpret_cast<float4*>(other)[(part * HEADS + h) * quads + quad] = y[h];
    }
    __syncthreads();
#pragma unroll 1
    for (int e = threadIdx.x; e < HEADS * head_dim; e += kThreads) {
      float total = other[e];
#pragma unroll 1
      for (int k = 1; k < parts; ++k) total += other[k * HEADS * head_dim + e];
      x[e] = total;
    }
    __syncthreads();
    return;
  }
  if (side.hadamard) {
#pragma unroll 1
    for (int start = 0; start < head_dim;) {
      const int block = hadamard_block(head_dim - start);
#pragma unroll 1
      for (int stride = 1; stride < block; stride *= 2) {
#pragma unroll 1
        for (int e = threadIdx.x; e < HEADS * block / 2; e += kThreads) {
          const int h = e / (block / 2), k = e % (block / 2);
          float* low = x + h * head_dim + start + 2 * stride * (k / stride) + k % stride;
          const float a = low[0], b = low[stride];
          low[0] = a + b;
          low[stride] = a - b;
        }
        __syncthreads();
      }
      const float scale = hadamard_scale(block);
#pragma unroll 1
      for (int e = threadIdx.x; e < HEADS * block; e += kThreads) {
        const int d = start + e % block;
        const float lambda = side.lambda == nullptr ? 1.0f : side.lambda[kv_head * head_dim + d];
        x[e / block * head_dim + d] *= scale * lambda;
      }
      __syncthreads();
      start += block;
    }
  }
}

// The partial results of the CTAs that share a pair -> out and lse. Shared floats: n_parts * HEADS,
// (1 + kInverseParts) * HEADS * D, 2 * HEADS. part(i): the i-th CTA's partial result. All threads
// of one CTA.
template <int HEADS, int kThreads, class Part>
__device__ __forceinline__ void combine(const DecodeParams& p, const Pair& pair, int n_parts,
                                        const Part& part, const float* exact, int value_padded_dim,
                                        int value_sub_dim, float* space) {
  const int D = p.head_dim, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float* x = space;                                          // [HEADS][D]
  float* other = x + HEADS * D;                              // [kInverseParts][HEADS][D]
  float* packed_factor = other + kInverseParts * HEADS * D;  // [HEADS]
  float* exact_factor = packed_factor + HEADS;               // [HEADS]
  float* weight = exact_factor + HEADS;                      // [n_parts][HEADS]
  const int pairs = D / 2;
  const float* scales =
      p.values.scales +
      (static_cast<int64_t>(p.values.n_sequences == 1 ? 0 : pair.sequence) * p.n_kv_heads +
       pair.kv_head) *
          value_padded_dim;
  if (warp < HEADS) {
    const int h = warp;
    float exact_top = kNothing, exact_sum = 0.0f, top = kNothing, sum = 0.0f;
    if (exact != nullptr) {
      exact_top = __ldcg(exact + HEADS * D + h);
      exact_sum = __ldcg(exact + HEADS * D + HEADS + h);
    }
    // Most often a lane has one part, all of whose loads are under way together.
#pragma unroll 1
    for (int i = lane; i < n_parts; i += 32) {
      const float m = __ldcg(part(i) + HEADS * D + h), l = __ldcg(part(i) + HEADS * D + HEADS + h);
      weight[i * HEADS + h] = m;
      const float next = fmaxf(top, m);
      sum = sum * exp2_fast(top - next) + l * exp2_fast(m - next);
      top = next;
    }
    float all_top = top;
#pragma unroll
    for (int step = 16; step >= 1; step >>= 1)
      all_top = fmaxf(all_top, __shfl_xor_sync(0xffffffffu, all_top, step));
    sum *= exp2_fast(top - all_top);
#pragma unroll
    for (int step = 16; step >= 1; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
#pragma unroll 1
    for (int i = lane; i < n_parts; i += 32)
      weight[i * HEADS + h] = exp2_fast(weight[i * HEADS + h] - all_top);
    if (lane == 0) {
      const float both = fmaxf(all_top, exact_top);
      const float packed_keep = exp2_fast(all_top - both), exact_keep = exp2_fast(exact_top - both);
      const float total = sum * packed_keep + exact_sum * exact_keep;
      const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
      packed_factor[h] = packed_keep * inverse;
      exact_factor[h] = exact_keep * inverse;
      if (p.lse != nullptr && h < pair.n_heads) {
        p.lse[static_cast<int64_t>(pair.sequence) * p.n_q_heads + pair.first_head + h] =
            total > 0.0f ? (both + log2f(total)) * kLn2 : -INFINITY;
      }
    }
  }
  __syncthreads();
  // A thread: two elements of every part, ascending.
#pragma unroll 1
  for (int e = threadIdx.x; e < HEADS * pairs; e += kThreads) {
    const int h = e / pairs;
    const float scale = __ldg(scales + (e - h * pairs) * 2 / value_sub_dim);
    float2 total = make_float2(0.0f, 0.0f);
#pragma unroll 8
    for (int i = 0; i < n_parts; ++i) {
      const float2 y = __ldcg(reinterpret_cast<const float2*>(part(i)) + e);
      total.x = fmaf(weight[i * HEADS + h], y.x, total.x);
      total.y = fmaf(weight[i * HEADS + h], y.y, total.y);
    }
    const float factor = packed_factor[h] * scale;
    x[2 * e] = total.x * factor;
    x[2 * e + 1] = total.y * factor;
  }
  __syncthreads();
  inverse_transform<HEADS, kThreads>(p.values, pair.kv_head, D, x, other);
  const int64_t row = (static_cast<int64_t>(pair.sequence) * p.n_q_heads + pair.first_head) * D;
#pragma unroll 1
  for (int e = threadIdx.x; e < pair.n_heads * D; e += kThreads) {
    float value = x[e];
    if (exact != nullptr) value = fmaf(__ldcg(exact + e), exact_factor[e / D], value);
    store_element(p.out, row + e, p.out_type, value);
  }
  __syncthreads();
}

}  // namespace veloxquant::attention::cuda
