

// Transforms of the heads of a pair: dense, with the matrix on its way to shared memory before the
// vectors are known, or Hadamard, in place.
#pragma once

#include "src/attention/cuda_shape.cuh"

namespace veloxquant::attention::cuda {

// Of a side that has one.
__device__ __forceinline__ const float* matrix_of(const SideView& side, int kv_head, int D) {
  return side.matrix + static_cast<int64_t>(kv_head) * D * D;
}

// A barrier of the first kWarps warps.
template <class S, int kWarps>
__device__ __forceinline__ void sync_warps() {
  if constexpr (kWarps == S::WARPS) {
    __syncthreads();
  } else {
    ptx::sync_threads<1, 32 * kWarps>();
  }
}

// A matrix sets out for shared memory, by the warps that transform queries; nothing where there is
// none, or no room.
template <class S>
__device__ __forceinline__ void stage_matrix(const DecodeParams& p, const SideView& side,
                                             int kv_head, const Shared<S>& shared) {
  if (side.matrix == nullptr || !p.matrix_in_shared) return;
  const int head_dim = S::head_dim(p);
  const float* matrix = matrix_of(side, kv_head, head_dim);
  const int t = threadIdx.x;
  constexpr int step = 32 * S::kQueryWarps;
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared.matrix)) + 16 * t;
  const float* from = matrix + 4 * t;
  const int count = head_dim * head_dim / 4;
  // As many turns for every thread: otherwise the compiler takes warps to be divided from here on.
#pragma unroll 4
  for (int e = 0; e < count; e += step) {
    if (t < step && t + e < count) {
      ptx::copy_async(to + 16 * e, from + 4 * e);
    }
  }
}
// Groups of threads that take every n-th row, each thread four columns.
template <int kWarps>
__device__ __forceinline__ int matrix_groups(int head_dim) {
  const int fit = 32 * kWarps / (head_dim / 4);
  return fit < kWarps ? fit : kWarps;
}

// x[D][HEADS] -> shared.rows, [groups][HEADS][D], each group's share of the sums. From shared
// memory where the matrix was staged there. By the first kWarps warps.
template <class S, int kWarps>
__device__ __forceinline__ void multiply_matrix(const DecodeParams& p, const SideView& side,
                                                int kv_head, const float* x,
                                                const Shared<S>& shared) {
  constexpr int HEADS = S::HEADS;
  const int head_dim = S::head_dim(p);
  float* const to = shared.rows;
  const float* matrix = p.matrix_in_shared ? shared.matrix : matrix_of(side, kv_head, head_dim);
  const int quads = head_dim / 4, n = matrix_groups<kWarps>(head_dim);
  const int quad = threadIdx.x % quads, group = threadIdx.x / quads;
  if (group >= n) return;
  const float4* from = reinterpret_cast<const float4*>(matrix) + group * quads + quad;
  const float* of = x + group * HEADS;
  float4 sum[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; ++h) sum[h] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  // Of a thread's rows; for up to 128 dimensions all.
  constexpr int kAhead = kWarps == S::WARPS ? 11 : 12;
#pragma unroll 1
  for (int begin = group; begin < head_dim; begin += kAhead * n) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (begin + k * n >= head_dim) break;
      const float4 m = from[k * n * quads];
#pragma unroll
      for (int h = 0; h < HEADS; h += 4) {
        const float4 y = *reinterpret_cast<const float4*>(of + k * n * HEADS + h);
        add_scaled(sum[h], y.x, m);
        add_scaled(sum[h + 1], y.y, m);
        add_scaled(sum[h + 2], y.z, m);
        add_scaled(sum[h + 3], y.w, m);
      }
    }
    from += kAhead * n * quads;
    of += kAhead * n * HEADS;
  }
#pragma unroll
  for (int h = 0; h < HEADS; ++h)
    reinterpret_cast<float4*>(to)[(group * HEADS + h) * quads + quad] = sum[h];
}

// The share sums above, in order: dimensions d and d + 1 of head h.
template <class S, int kWarps>
__device__ __forceinline__ float2 add_groups(const float* shares, int head_dim, int h, int d) {
  const int n = matrix_groups<kWarps>(head_dim);
  float2 total = make_float2(0.0f, 0.0f);
#pragma unroll 12
  for (int g = 0; g < n; ++g) {
    const float2 x = *reinterpret_cast<const float2*>(shares + (g * S::HEADS + h) * head_dim + d);
    total.x += x.x;
    total.y += x.y;
  }
  return total;
}

// x[D][HEADS] in place, without the scale, by the first kWarps warps; between barriers, and one
// follows.
template <class S, int kWarps>
__device__ __forceinline__ void hadamard_heads(float* x, int head_dim) {
  constexpr int HEADS = S::HEADS;
#pragma unroll 1
  for (int start = 0; start < head_dim;) {
    const int block = hadamard_block(head_dim - start);
    const float scale = hadamard_scale(block);
#pragma unroll 1
    for (int stride = 1; stride < block; stride *= 2) {
      const float unit = 2 * stride == block ? scale : 1.0f;
      for (int e = threadIdx.x; e < HEADS * block / 2; e += 32 * kWarps) {
        const int h = e % HEADS, k = e / HEADS;
        float* low = x + (start + 2 * stride * (k / stride) + k % stride) * HEADS + h;
        const float a = low[0], c = low[stride * HEADS];
        low[0] = (a + c) * unit;
        low[stride * HEADS] = (a - c) * unit;
      }
      sync_warps<S, kWarps>();
    }
    start += block;
  }
}

}  // namespace veloxquant::attention::cuda
