// The partial results of the CTAs that share a pair -> out and log-sum-exp: one CTA a query head,
// after the attention. Its matrix is on the way while the last of the attention's CTAs end.
#pragma once

#include "src/attention/cuda_parts.cuh"

namespace veloxquant::attention::cuda {

constexpr int kCombineThreads = 256;
constexpr int kCombineWarps = kCombineThreads / 32;
constexpr int kCombineAhead = 16;  // 16-byte loads of the matrix that a thread has under way

// Sums of `groups` rows of D floats in shared memory, in order -> x[D].
__device__ __forceinline__ void add_groups(const float* rows, int groups, int D, float* x) {
  __syncthreads();
  for (int d = threadIdx.x; d < D; d += kCombineThreads) {
    float total = rows[d];
    for (int g = 1; g < groups; ++g) total += rows[g * D + d];
    x[d] = total;
  }
  __syncthreads();
}

// Takes another part's maximum, and its sum of exponentials over that, into (top, sum).
__device__ __forceinline__ void add_part(float& top, float& sum, float other_top,
                                         float other_sum) {
  const float next = fmaxf(top, other_top);
  sum = sum * exp2_fast(top - next) + other_sum * exp2_fast(other_top - next);
  top = next;
}

// The same over the lanes of a warp, to all of them.
__device__ __forceinline__ void add_lanes(float& top, float& sum) {
#pragma unroll
  for (int step = 16; step >= 1; step >>= 1) {
    const float other = __shfl_xor_sync(0xffffffffu, top, step);
    const float other_sum = __shfl_xor_sync(0xffffffffu, sum, step);
    add_part(top, sum, other, other_sum);
  }
}

// HEADS: of a partial result. Grid: pairs x heads_per_group.
template <int HEADS>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ DecodeParams p, int value_padded_dim,
                   int value_sub_dim) {
  __shared__ __align__(16) float rows[4 * kCombineThreads];  // [groups][D]
  __shared__ __align__(16) float x[kMaxHeadDim];
  __shared__ float warp_top[kCombineWarps], warp_sum[kCombineWarps];
  __shared__ float factors[3];  // of the packed parts, their maximum, of the exact tokens
  const int D = p.head_dim, t = threadIdx.x, lane = t & 31, warp = t >> 5;
  const int index = blockIdx.x / p.heads_per_group, h = blockIdx.x % p.heads_per_group;
  const int head_group = index / p.batch, b = index - head_group * p.batch;
  const int kv_head = head_group / p.n_groups,
            in_group = head_group % p.n_groups * p.heads_per_group + h;
  const int quads = D / 4, groups = kCombineThreads / quads;
  const int quad = t % quads, group = t / quads;
  const bool works = group < groups;
  const float4* matrix =
      reinterpret_cast<const float4*>(p.values.matrix + static_cast<int64_t>(kv_head) * D * D);
  float4 ahead[kCombineAhead];
  if (p.values.matrix != nullptr && works) {
#pragma unroll
    for (int k = 0; k < kCombineAhead; ++k) {
      const int row = group + k * groups;
      if (row < D) ahead[k] = __ldg(matrix + static_cast<int64_t>(row) * quads + quad);
    }
  }
  const float scale =
      __ldg(p.values.scales +
            (static_cast<int64_t>(p.values.n_sequences == 1 ? 0 : b) * p.n_kv_heads + kv_head) *
                value_padded_dim +
            min(t, D - 1) / value_sub_dim);
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  if (in_group >= p.group) return;
  const int* plan = reinterpret_cast<const int*>(p.workspace + p.plan_at);
  const int first = __ldcg(plan + b), n_parts = __ldcg(plan + b + 1) - first;
  const int per_head = __ldcg(plan + p.batch);
  const int64_t size = partial_floats(HEADS, D);
  const float* partials = reinterpret_cast<const float*>(p.workspace + p.partial_at) +
                          (static_cast<int64_t>(head_group) * per_head + first) * size;
  const float* exact = reinterpret_cast<const float*>(p.workspace + p.exact_at) + index * size;
  const bool has_exact = p.n_exact != nullptr && p.n_exact[b] > 0;
  float exact_value = 0.0f;
  if (has_exact && t < D) exact_value = __ldcg(exact + h * D + t);

  // The maximum and the sum over all parts.
  float top = kNothing, sum = 0.0f;
  for (int i = t; i < n_parts; i += kCombineThreads) {
    add_part(top, sum, __ldcg(partials + i * size + HEADS * D + h),
             __ldcg(partials + i * size + HEADS * D + HEADS + h));
  }
  add_lanes(top, sum);
  if (lane == 0) {
    warp_top[warp] = top;
    warp_sum[warp] = sum;
  }
  __syncthreads();
  if (t == 0) {
    top = kNothing;
    sum = 0.0f;
    for (int w = 0; w < kCombineWarps; ++w) add_part(top, sum, warp_top[w], warp_sum[w]);
    float exact_top = kNothing, exact_sum = 0.0f;
    if (has_exact) {
      exact_top = __ldcg(exact + HEADS * D + h);
      exact_sum = __ldcg(exact + HEADS * D + HEADS + h);
    }
    const float both = fmaxf(top, exact_top);
    const float packed_keep = exp2_fast(top - both), exact_keep = exp2_fast(exact_top - both);
    const float total = sum * packed_keep + exact_sum * exact_keep;
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    factors[0] = packed_keep * inverse;
    factors[1] = top;
    factors[2] = exact_keep * inverse;
    if (p.lse != nullptr) {
      p.lse[static_cast<int64_t>(b) * p.n_q_heads + kv_head * p.group + in_group] =
          total > 0.0f ? (both + log2f(total)) * kLn2 : -INFINITY;
    }
  }
  __syncthreads();

  // A thread: four dimensions of every `groups`th part.
  if (works) {
    const float all_top = factors[1];
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int i = group; i < n_parts; i += groups) {
      const float* part = partials + i * size;
      const float4 y = __ldcg(reinterpret_cast<const float4*>(part + h * D) + quad);
      const float weight = exp2_fast(__ldcg(part + HEADS * D + h) - all_top);
      total.x = fmaf(weight, y.x, total.x);
      total.y = fmaf(weight, y.y, total.y);
      total.z = fmaf(weight, y.z, total.z);
      total.w = fmaf(weight, y.w, total.w);
    }
    reinterpret_cast<float4*>(rows)[group * quads + quad] = total;
  }
  add_groups(rows, groups, D, x);
  if (t < D) x[t] *= factors[0] * scale;
  __syncthreads();

  if (p.values.matrix != nullptr) {
    if (works) {
      float4 y = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      const auto add = [&](float4 m, int row) {
        const float xj = x[row];
        y.x = fmaf(xj, m.x, y.x);
        y.y = fmaf(xj, m.y, y.y);
        y.z = fmaf(xj, m.z, y.z);
        y.w = fmaf(xj, m.w, y.w);
      };
#pragma unroll
      for (int k = 0; k < kCombineAhead; ++k) {
        const int row = group + k * groups;
        if (row < D) add(ahead[k], row);
      }
#pragma unroll 8
      for (int row = group + kCombineAhead * groups; row < D; row += groups)
        add(__ldg(matrix + static_cast<int64_t>(row) * quads + quad), row);
      reinterpret_cast<float4*>(rows)[group * quads + quad] = y;
    }
    add_groups(rows, groups, D, x);
  } else if (p.values.hadamard) {
    for (int start = 0; start < D;) {
      const int block = hadamard_block(D - start);
      for (int stride = 1; stride < block; stride *= 2) {
        if (t < block / 2) {
          float* low = x + start + 2 * stride * (t / stride) + t % stride;
          const float a = low[0], c = low[stride];
          low[0] = a + c;
          low[stride] = a - c;
        }
        __syncthreads();
      }
      const float unit = hadamard_scale(block);
      if (t < block) {
        const float lambda =
            p.values.lambda == nullptr ? 1.0f : p.values.lambda[kv_head * D + start + t];
        x[start + t] *= unit * lambda;
      }
      __syncthreads();
      start += block;
    }
  }
  if (t < D) {
    const int64_t row = static_cast<int64_t>(b) * p.n_q_heads + kv_head * p.group + in_group;
    store_element(p.out, row * D + t, p.out_type, fmaf(exact_value, factors[2], x[t]));
  }
}

}  // namespace veloxquant::attention::cuda
