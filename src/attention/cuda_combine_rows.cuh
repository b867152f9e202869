// The same as cuda_combine.cuh for calls of many rows (query heads of all sequences): a CTA takes
// ROWS rows of one KV head, which share its one read of the transform's matrix; a CTA a row would
// read 64 KB each and need several waves. For few rows the other is sooner done. Sums are in a
// fixed order.
#pragma once

#include "src/attention/cuda_combine.cuh"

namespace veloxquant::attention::cuda {

// Four dimensions of a row a lane, and the four 128 further on.
struct RowPiece {
  float4 quad[2];
};

__device__ __forceinline__ void add_scaled(float4& sum, float factor, float4 x) {
  sum.x = fmaf(factor, x.x, sum.x);
  sum.y = fmaf(factor, x.y, sum.y);
  sum.z = fmaf(factor, x.z, sum.z);
  sum.w = fmaf(factor, x.w, sum.w);
}

// A lane's piece of the sum of n rows in shared memory, `stride` floats apart.
__device__ __forceinline__ RowPiece add_rows(const float* rows, int n, int stride, int quads,
                                             int lane) {
  RowPiece sum = {};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (lane + 32 * k >= quads) break;
#pragma unroll 4
    for (int i = 0; i < n; ++i) {
      add_scaled(sum.quad[k], 1.0f,
                 reinterpret_cast<const float4*>(rows + i * stride)[lane + 32 * k]);
    }
  }
  return sum;
}

// heads: of a partial result. Grid: KV heads x groups x tiles of ROWS of their rows.
template <int ROWS>
__global__ void __launch_bounds__(kCombineThreads, 2)
    combine_rows_kernel(const __grid_constant__ DecodeParams p, int heads, int value_padded_dim,
                        int value_sub_dim) {
  constexpr int kShare = kCombineWarps / ROWS;  // warps of a row
  constexpr int kCombineParts = 2;              // parts that a warp has under way
  constexpr int kSums = 4 * kCombineThreads * ROWS, kLeast = kCombineWarps * kMaxHeadDim;
  __shared__ __align__(16) float sums[kSums > kLeast ? kSums : kLeast];
  __shared__ __align__(16) float x[kMaxHeadDim * ROWS];
  const int D = p.head_dim, t = threadIdx.x, lane = t & 31, warp = t >> 5;
  const int n_rows = p.batch * p.heads_per_group, tiles = divide_up(n_rows, ROWS);
  const int head_group = blockIdx.x / tiles, r = warp / kShare;
  const int row = (blockIdx.x - head_group * tiles) * ROWS + r;
  const int b = min(row, n_rows - 1) / p.heads_per_group,
            h = min(row, n_rows - 1) % p.heads_per_group;
  const int kv_head = head_group / p.n_groups,
            in_group = head_group % p.n_groups * p.heads_per_group + h;
  const bool is_row = row < n_rows && in_group < p.group;
  const int quads = D / 4, groups = kCombineThreads / quads;
  const int quad = t % quads, group = t / quads;
  const bool works = group < groups;
  const float4* matrix =
      reinterpret_cast<const float4*>(p.values.matrix + static_cast<int64_t>(kv_head) * D * D);
  float4 ahead[kCombineAhead];
  if (p.values.matrix != nullptr && works) {
#pragma unroll
    for (int k = 0; k < kCombineAhead; ++k) {
      const int at = group + k * groups;
      if (at < D) ahead[k] = __ldg(matrix + static_cast<int64_t>(at) * quads + quad);
    }
  }
  const float* scales =
      p.values.scales +
      (static_cast<int64_t>(p.values.n_sequences == 1 ? 0 : b) * p.n_kv_heads + kv_head) *
          value_padded_dim;
  float2 scale[2];  // of the lane's first two dimensions and of the other two
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int d = 4 * (lane + 32 * k);
    scale[k] = make_float2(0.0f, 0.0f);
    if (d < D)
      scale[k] =
          make_float2(__ldg(scales + d / value_sub_dim), __ldg(scales + (d + 2) / value_sub_dim));
  }
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  const int64_t size = partial_floats(heads, D);
  const float* exact = reinterpret_cast<const float*>(p.workspace + p.exact_at) +
                       (static_cast<int64_t>(head_group) * p.batch + b) * size;
  const bool has_exact = is_row && p.n_exact != nullptr && p.n_exact[b] > 0;
  float exact_top = kNothing, exact_sum = 0.0f, exact_keep = 0.0f;
  RowPiece exact_row = {};
  if (is_row) {
    const int* plan = reinterpret_cast<const int*>(p.workspace + p.plan_at);
    const int first = __ldcg(plan + b), n_parts = __ldcg(plan + b + 1) - first;
    const float* partials =
        reinterpret_cast<const float*>(p.workspace + p.partial_at) +
        (static_cast<int64_t>(head_group) * __ldcg(plan + p.batch) + first) * size;
    if (has_exact) {
      exact_top = __ldcg(exact + heads * D + h);
      exact_sum = __ldcg(exact + heads * D + heads + h);
      if (warp % kShare == 0) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if (lane + 32 * k < quads)
            exact_row.quad[k] =
                __ldcg(reinterpret_cast<const float4*>(exact + h * D) + lane + 32 * k);
        }
      }
    }
    // The warps of a row take part after part; the first of them set out before the maximum is
    // known.
    RowPiece part[kCombineParts];
    float part_top[kCombineParts];
    const auto load_parts = [&](int begin) {
#pragma unroll
      for (int i = 0; i < kCombineParts; ++i) {
        const int at = begin + i * kShare;
        part[i] = {};
        part_top[i] = kNothing;
        if (at < n_parts) {
          const float* from = partials + at * size;
          part_top[i] = __ldcg(from + heads * D + h);
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            if (lane + 32 * k < quads)
              part[i].quad[k] =
                  __ldcg(reinterpret_cast<const float4*>(from + h * D) + lane + 32 * k);
          }
        }
      }
    };
    load_parts(warp % kShare);
    float top = kNothing, sum = 0.0f;
    for (int i = lane; i < n_parts; i += 32) {
      add_part(top, sum, __ldcg(partials + i * size + heads * D + h),
               __ldcg(partials + i * size + heads * D + heads + h));
    }
    add_lanes(top, sum);
    const float both = fmaxf(top, exact_top);
    const float total = sum * exp2_fast(top - both) + exact_sum * exp2_fast(exact_top - both);
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    const float packed_keep = exp2_fast(top - both) * inverse;
    exact_keep = exp2_fast(exact_top - both) * inverse;
    if (p.lse != nullptr && warp % kShare == 0 && lane == 0) {
      p.lse[static_cast<int64_t>(b) * p.n_q_heads + kv_head * p.group + in_group] =
          total > 0.0f ? (both + log2f(total)) * kLn2 : -INFINITY;
    }
    RowPiece packed = {};
#pragma unroll 1
    for (int begin = warp % kShare; begin < n_parts;) {
#pragma unroll
      for (int i = 0; i < kCombineParts; ++i) {
        const float weight = exp2_fast(part_top[i] - top);
        add_scaled(packed.quad[0], weight, part[i].quad[0]);
        add_scaled(packed.quad[1], weight, part[i].quad[1]);
      }
      begin += kCombineParts * kShare;
      load_parts(begin);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int d = 4 * (lane + 32 * k);
      if (d >= D) break;
      const float low = packed_keep * scale[k].x, high = packed_keep * scale[k].y;
      float4 y = packed.quad[k];
      y = make_float4(y.x * low, y.y * low, y.z * high, y.w * high);
      reinterpret_cast<float4*>(sums + warp * D)[lane + 32 * k] = y;
    }
  }
  __syncthreads();

  // The first warp of a row has it from here on; rows that are none are zero.
  RowPiece y = {};
  if (is_row && warp % kShare == 0) y = add_rows(sums + warp * D, kShare, D, quads, lane);
  if (p.values.matrix != nullptr) {
    if (warp % kShare == 0) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int d = 4 * (lane + 32 * k);
        if (d >= D) break;
        x[d * ROWS + r] = y.quad[k].x;
        x[(d + 1) * ROWS + r] = y.quad[k].y;
        x[(d + 2) * ROWS + r] = y.quad[k].z;
        x[(d + 3) * ROWS + r] = y.quad[k].w;
      }
    }
    __syncthreads();
    if (works) {
      float4 product[ROWS];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) product[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int k = 0; k < kCombineAhead; ++k) {
        const int at = group + k * groups;
        if (at < D) {
#pragma unroll
          for (int i = 0; i < ROWS; ++i) add_scaled(product[i], x[at * ROWS + i], ahead[k]);
        }
      }
#pragma unroll 4
      for (int at = group + kCombineAhead * groups; at < D; at += groups) {
        const float4 m = __ldg(matrix + static_cast<int64_t>(at) * quads + quad);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) add_scaled(product[i], x[at * ROWS + i], m);
      }
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
        reinterpret_cast<float4*>(sums)[(group * ROWS + i) * quads + quad] = product[i];
    }
    __syncthreads();
    if (is_row && warp % kShare == 0) y = add_rows(sums + r * D, groups, ROWS * D, quads, lane);
  } else if (p.values.hadamard && is_row && warp % kShare == 0) {
    // Within a warp: a row of x is its own here.
    float* own = x + r * kMaxHeadDim;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (lane + 32 * k < quads) reinterpret_cast<float4*>(own)[lane + 32 * k] = y.quad[k];
    }
    for (int start = 0; start < D;) {
      const int block = hadamard_block(D - start);
      for (int stride = 1; stride < block; stride *= 2) {
        __syncwarp();
        for (int e = lane; e < block / 2; e += 32) {
          float* low = own + start + 2 * stride * (e / stride) + e % stride;
          const float a = low[0], c = low[stride];
          low[0] = a + c;
          low[stride] = a - c;
        }
      }
      __syncwarp();
      const float unit = hadamard_scale(block);
      for (int e = lane; e < block; e += 32) {
        const float lambda =
            p.values.lambda == nullptr ? 1.0f : p.values.lambda[kv_head * D + start + e];
        own[start + e] *= unit * lambda;
      }
      start += block;
    }
    __syncwarp();
    y = add_rows(own, 1, 0, quads, lane);
  }
  if (!is_row || warp % kShare != 0) return;
  const int64_t to = (static_cast<int64_t>(b) * p.n_q_heads + kv_head * p.group + in_group) * D;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int d = 4 * (lane + 32 * k);
    if (d >= D) break;
    add_scaled(y.quad[k], exact_keep, exact_row.quad[k]);
    store_element(p.out, to + d, p.out_type, y.quad[k].x);
    store_element(p.out, to + d + 1, p.out_type, y.quad[k].y);
    store_element(p.out, to + d + 2, p.out_type, y.quad[k].z);
    store_element(p.out, to + d + 3, p.out_type, y.quad[k].w);
  }
}

}  // namespace veloxquant::attention::cuda
