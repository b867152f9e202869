// Queries -> operand rows of the scores: one CTA a pair, before the attention.
//
// Rows [2 terms][8 heads][row bytes] in codec coordinates: int8 entries take q as 256 high + low,
// both int8; half entries as a sum of two fp16. The same in the original coordinates, in the dtype
// of the exact tokens, for those. The scales undo the normalisation and carry scale * log2(e).
#pragma once

#include "src/attention/cuda_exact.cuh"

namespace veloxquant::attention::cuda {

constexpr int kQueryThreads = 512;
constexpr int kQueryHeads = 4;  // that meet at once in shared memory
constexpr int kQueryWarps = kQueryThreads / 32;

__device__ __forceinline__ float warp_largest(float x) {
#pragma unroll
  for (int step = 16; step >= 1; step >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// A warp: one row of `dim` values, `padded` stored, as two 16-bit terms. Returns what a unit stands
// for.
template <bool kBf16>
__device__ __forceinline__ float split_16(const float* x, int dim, int padded, int lane,
                                          uint8_t* high_row, uint8_t* low_row) {
  float top = 0.0f;
  for (int d = lane; d < dim; d += 32) top = fmaxf(top, fabsf(x[d]));
  top = warp_largest(top);
  // A power of two brings the largest to [1, 2).
  const int exponent = top > 0.0f ? min(max(ilogbf(top), -100), 100) : 0;
  const float inverse = scalbnf(1.0f, -exponent);
  for (int d = 2 * lane; d < padded; d += 64) {
    const float a = d < dim ? x[d] * inverse : 0.0f, b = d + 1 < dim ? x[d + 1] * inverse : 0.0f;
    const uint32_t high = pack_16<kBf16>(a, b);
    const float2 taken = unpack_16<kBf16>(high);
    reinterpret_cast<uint32_t*>(high_row)[d / 2] = high;
    reinterpret_cast<uint32_t*>(low_row)[d / 2] = pack_16<kBf16>(a - taken.x, b - taken.y);
  }
  return scalbnf(1.0f, exponent);
}

template <bool kHalfK, int HEADS>
__global__ void __launch_bounds__(kQueryThreads, HEADS == 4 ? 2 : 1)
    query_kernel(const __grid_constant__ DecodeParams p, int key_padded_dim, int key_sub_dim,
                 int exact_dim) {
  __shared__ __align__(16) float x[HEADS][kMaxHeadDim];
  __shared__ __align__(16) float y[HEADS][kMaxHeadDim];
  __shared__ __align__(16) float partial[kQueryWarps / 2][kQueryHeads][128];
  const int D = p.head_dim, t = threadIdx.x, lane = t % 32, warp = t / 32;
  const int pair = blockIdx.x, b = pair % p.batch, head_group = pair / p.batch;
  const int kv_head = head_group / p.n_groups,
            in_group = head_group % p.n_groups * p.heads_per_group;
  const int first_head = kv_head * p.group + in_group,
            n_heads = min(p.heads_per_group, p.group - in_group);
  // A warp: every 16th row of the matrix, a lane four columns; under way while the stream's last
  // kernel ends.
  const float* matrix = p.keys.matrix + static_cast<int64_t>(kv_head) * D * D;
  constexpr int kRows = 8;
  float4 rows_ahead[kRows];
  if (p.keys.matrix != nullptr) {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int row = warp + k * kQueryWarps;
      rows_ahead[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (row < D && 4 * lane < D) {
        rows_ahead[k] = __ldg(
            reinterpret_cast<const float4*>(matrix + static_cast<int64_t>(row) * D + 4 * lane));
      }
    }
  }
  const float* scales =
      p.keys.scales +
      (static_cast<int64_t>(p.keys.n_sequences == 1 ? 0 : b) * p.n_kv_heads + kv_head) *
          key_padded_dim;
  float scale_ahead[kMaxHeadDim / 32];
#pragma unroll
  for (int k = 0; k < kMaxHeadDim / 32; ++k) {
    const int d = lane + 32 * k;
    scale_ahead[k] = d < D ? __ldg(scales + d / key_sub_dim) : 0.0f;
  }
#if __CUDA_ARCH__ >= 900
  // What came before on the stream is done and its writes are seen: only then may the attention
  // begin.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  for (int e = t; e < HEADS * D; e += kQueryThreads) {
    const int h = e / D, d = e % D;
    const int64_t at = (static_cast<int64_t>(b) * p.n_q_heads + first_head + h) * D + d;
    x[h][d] = h < n_heads ? load_element(p.q, at, p.q_type) : 0.0f;
  }
  __syncthreads();
  if (p.keys.matrix != nullptr) {
    for (int start = 0; start < D; start += 128) {
      const int column = start + 4 * lane;
      float4 sum[HEADS];
#pragma unroll
      for (int h = 0; h < HEADS; ++h) sum[h] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int first = 0; first < D; first += kRows * kQueryWarps) {
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          const int row = first + warp + k * kQueryWarps;
          if (row >= D || column >= D) break;
          float4 m = rows_ahead[k];
          if (start + first > 0)
            m = __ldg(
                reinterpret_cast<const float4*>(matrix + static_cast<int64_t>(row) * D + column));
#pragma unroll
          for (int h = 0; h < HEADS; ++h) {
            const float xi = x[h][row];
            sum[h].x = fmaf(xi, m.x, sum[h].x);
            sum[h].y = fmaf(xi, m.y, sum[h].y);
            sum[h].z = fmaf(xi, m.z, sum[h].z);
            sum[h].w = fmaf(xi, m.w, sum[h].w);
          }
        }
      }
      // Sums of the warps, kQueryHeads heads at a time: the upper warps' first, the lower add
      // theirs.
#pragma unroll
      for (int h0 = 0; h0 < HEADS; h0 += kQueryHeads) {
        if (h0 >= n_heads) break;
        __syncthreads();
        if (warp >= kQueryWarps / 2) {
#pragma unroll
          for (int h = 0; h < kQueryHeads; ++h) {
            *reinterpret_cast<float4*>(&partial[warp - kQueryWarps / 2][h][4 * lane]) = sum[h0 + h];
          }
        }
        __syncthreads();
        if (warp < kQueryWarps / 2) {
#pragma unroll
          for (int h = 0; h < kQueryHeads; ++h) {
            float4* at = reinterpret_cast<float4*>(&partial[warp][h][4 * lane]);
            const float4 a = *at, c = sum[h0 + h];
            *at = make_float4(a.x + c.x, a.y + c.y, a.z + c.z, a.w + c.w);
          }
        }
        __syncthreads();
        const int h = t / 128, d = t % 128;
        if (start + d < D) {
          float total = 0.0f;
#pragma unroll
          for (int w = 0; w < kQueryWarps / 2; ++w) total += partial[w][h][d];
          y[h0 + h][start + d] = total;
        }
      }
    }
  } else {
    __syncthreads();
    for (int e = t; e < HEADS * D; e += kQueryThreads) {
      const float lambda = p.keys.lambda == nullptr ? 1.0f : p.keys.lambda[kv_head * D + e % D];
      y[e / D][e % D] = x[e / D][e % D] * lambda;
    }
    if (p.keys.hadamard) {
      for (int start = 0; start < D;) {
        const int block = hadamard_block(D - start);
        for (int stride = 1; stride < block; stride *= 2) {
          __syncthreads();
          for (int e = t; e < HEADS * block / 2; e += kQueryThreads) {
            const int h = e / (block / 2), k = e % (block / 2);
            float* low = &y[h][start + 2 * stride * (k / stride) + k % stride];
            const float a = low[0], c = low[stride];
            low[0] = a + c;
            low[stride] = a - c;
          }
        }
        __syncthreads();
        const float scale = hadamard_scale(block);
        for (int e = t; e < HEADS * block; e += kQueryThreads)
          y[e / block][start + e % block] *= scale;
        start += block;
      }
    }
  }
  __syncthreads();
  // The upper warps: the query for the exact tokens.
  if (warp >= 8) {
    if (p.n_exact == nullptr) return;
    const int h = warp - 8;
    uint8_t* rows =
        p.workspace + p.exact_query_at + static_cast<int64_t>(pair) * (32 * exact_dim + 32);
    uint8_t *high = rows + 2 * h * exact_dim, *low = rows + 2 * (8 + h) * exact_dim;
    const float* row = x[h < HEADS ? h : 0];
    const int dim = h < n_heads ? D : 0;
    const float unit = p.exact_bf16 ? split_16<true>(row, dim, exact_dim, lane, high, low)
                                    : split_16<false>(row, dim, exact_dim, lane, high, low);
    if (lane == 0) reinterpret_cast<float*>(rows + 32 * exact_dim)[h] = unit * p.scale * kLog2e;
    return;
  }
  // A warp a head: fold the scales of the tables in, split into two terms. Missing heads are zero.
  const int h = warp < HEADS ? warp : 0, dim = warp < n_heads ? D : 0;
  uint8_t* rows = p.workspace + p.query_at + static_cast<int64_t>(pair) * 16 * p.query_row_bytes;
  uint8_t *high_row = rows + warp * p.query_row_bytes,
          *low_row = rows + (8 + warp) * p.query_row_bytes;
  float unit;
  if constexpr (kHalfK) {
    unit = split_16<false>(y[h], dim, p.query_row_bytes / 2, lane, high_row, low_row);
  } else {
    float top = 0.0f, scaled[kMaxHeadDim / 32];
#pragma unroll
    for (int k = 0; k < kMaxHeadDim / 32; ++k) {
      const int d = lane + 32 * k;
      scaled[k] = d < dim ? y[h][d] * scale_ahead[k] : 0.0f;
      top = fmaxf(top, fabsf(scaled[k]));
    }
    top = warp_largest(top);
    constexpr float kLargest = 32639.0f;   // so that the high term is at most 127
    unit = fmaxf(top / kLargest, 1e-30f);  // never 0: a masked score is -inf times it
    const float inverse = top > 0.0f ? kLargest / top : 0.0f;
#pragma unroll
    for (int k = 0; k < kMaxHeadDim / 32; ++k) {
      const int d = lane + 32 * k;
      if (d >= p.query_row_bytes) break;
      const int value = max(-32639, min(32639, __float2int_rn(scaled[k] * inverse)));
      const int high = (value + 128) >> 8;
      high_row[d] = static_cast<uint8_t>(high);
      low_row[d] = static_cast<uint8_t>(value - 256 * high);
    }
  }
  if (lane == 0) {
    reinterpret_cast<float*>(p.workspace + p.query_scale_at)[pair * 8 + warp] =
        unit * p.scale * kLog2e;
  }
}

}  // namespace veloxquant::attention::cuda
