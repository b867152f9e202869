// Before the attention, in one launch: queries -> operand rows of the scores, and the attention on
// the exact tokens.
//
// Rows [2 terms][8 heads][row bytes] in codec coordinates: int8 entries take q as 256 high + low,
// both int8; half entries as a sum of two fp16. The scales undo the normalisation and carry scale *
// log2(e). The first CTAs do this, each for some sequences of one KV head, which share one read of
// its matrix; then comes a CTA for the exact tokens of each pair, whose partial result the
// combination takes in.
#pragma once

#include "src/attention/cuda_exact.cuh"

namespace veloxquant::attention::cuda {

constexpr int kQueryThreads = 256;
constexpr int kQueryHeads = 4;  // that meet at once in shared memory
constexpr int kQueryWarps = kQueryThreads / 32;
constexpr int kQueryStride = kMaxHeadDim + 8;

// Shared memory in floats: queries, then what a CTA of either sort needs.
constexpr int query_shared_floats(int heads, int dim) {
  const int transform = heads * kMaxHeadDim + kQueryWarps * kQueryHeads * 128;
  const int exact = kQueryWarps * heads * (dim + 2);
  return heads * kQueryStride + (transform > exact ? transform : exact);
}

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
  const int exponent = exponent_of(top);
  const float inverse = power_of_two(-exponent);
  for (int d = 2 * lane; d < padded; d += 64) {
    const float a = d < dim ? x[d] * inverse : 0.0f, b = d + 1 < dim ? x[d + 1] * inverse : 0.0f;
    const uint32_t high = pack_16<kBf16>(a, b);
    const float2 taken = unpack_16<kBf16>(high);
    reinterpret_cast<uint32_t*>(high_row)[d / 2] = high;
    reinterpret_cast<uint32_t*>(low_row)[d / 2] = pack_16<kBf16>(a - taken.x, b - taken.y);
  }
  return power_of_two(exponent);
}

// The queries of a pair -> x[head][kQueryStride]; 0 for heads that are none.
template <int HEADS>
__device__ __forceinline__ void load_queries(const DecodeParams& p, const Pair& pair, float* x) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= HEADS) return;
  const int64_t row =
      (static_cast<int64_t>(pair.sequence) * p.n_q_heads + pair.first_head + warp) * p.head_dim;
#pragma unroll 4
  for (int d = lane; d < p.head_dim; d += 32)
    x[warp * kQueryStride + d] = warp < pair.n_heads ? load_element(p.q, row + d, p.q_type) : 0.0f;
}

// What came before on the stream is done and its writes are seen; the attention may set out.
__device__ __forceinline__ void wait_for_stream() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Hadamard with smoothing, or nothing, in shared memory. All threads, between barriers.
template <int HEADS>
__device__ __forceinline__ void transform_queries(const DecodeParams& p, int kv_head,
                                                  const float* x, float* y) {
  const int D = p.head_dim, t = threadIdx.x;
  for (int e = t; e < HEADS * D; e += kQueryThreads) {
    const int h = e / D, d = e - h * D;
    const float lambda = p.keys.lambda == nullptr ? 1.0f : p.keys.lambda[kv_head * D + d];
    y[h * kMaxHeadDim + d] = x[h * kQueryStride + d] * lambda;
  }
  if (!p.keys.hadamard) return;
  for (int start = 0; start < D;) {
    const int block = hadamard_block(D - start);
    for (int stride = 1; stride < block; stride *= 2) {
      __syncthreads();
      for (int e = t; e < HEADS * block / 2; e += kQueryThreads) {
        const int h = e / (block / 2), k = e % (block / 2);
        float* low = y + h * kMaxHeadDim + start + 2 * stride * (k / stride) + k % stride;
        const float a = low[0], c = low[stride];
        low[0] = a + c;
        low[stride] = a - c;
      }
    }
    __syncthreads();
    const float scale = hadamard_scale(block);
    for (int e = t; e < HEADS * block; e += kQueryThreads)
      y[e / block * kMaxHeadDim + start + e % block] *= scale;
    start += block;
  }
}

// Sequences first .. last - 1 of a head group.
template <bool kHalfK, int HEADS>
__device__ __forceinline__ void prepare_queries(const DecodeParams& p, int head_group, int first,
                                                int last, int key_padded_dim, int key_sub_dim,
                                                float* shared) {
  float* const x = shared;                         // [HEADS][kQueryStride]
  float* const y = x + HEADS * kQueryStride;       // [HEADS][kMaxHeadDim]
  float* const partial = y + HEADS * kMaxHeadDim;  // [warps][kQueryHeads][128]
  const int D = p.head_dim, t = threadIdx.x, lane = t % 32, warp = t / 32;
  const int kv_head = head_group / p.n_groups;
  // A warp: every 8th row of the matrix, a lane four columns; under way while the stream's last
  // kernel ends.
  const float* matrix = p.keys.matrix + static_cast<int64_t>(kv_head) * D * D;
  constexpr int kRows = 16;
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
  wait_for_stream();
#pragma unroll 1
  for (int b = first; b < last; ++b) {
    const Pair pair = pair_of(p, head_group, b);
    __syncthreads();
    load_queries<HEADS>(p, pair, x);
    __syncthreads();
    if (p.keys.matrix != nullptr) {
      for (int start = 0; start < D; start += 128) {
        const int column = start + 4 * lane;
        float4 sum[HEADS];
#pragma unroll
        for (int h = 0; h < HEADS; ++h) sum[h] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int row0 = 0; row0 < D; row0 += kRows * kQueryWarps) {
#pragma unroll
          for (int k = 0; k < kRows; ++k) {
            const int row = row0 + warp + k * kQueryWarps;
            if (row >= D || column >= D) break;
            float4 m = rows_ahead[k];
            if (start + row0 > 0) {
              m = __ldg(
                  reinterpret_cast<const float4*>(matrix + static_cast<int64_t>(row) * D + column));
            }
#pragma unroll
            for (int h = 0; h < HEADS; ++h) {
              const float xi = x[h * kQueryStride + row];
              sum[h].x = fmaf(xi, m.x, sum[h].x);
              sum[h].y = fmaf(xi, m.y, sum[h].y);
              sum[h].z = fmaf(xi, m.z, sum[h].z);
              sum[h].w = fmaf(xi, m.w, sum[h].w);
            }
          }
        }
        // Sums of the warps, kQueryHeads heads at a time.
#pragma unroll
        for (int h0 = 0; h0 < HEADS; h0 += kQueryHeads) {
          if (h0 >= pair.n_heads) break;
          __syncthreads();
#pragma unroll
          for (int h = 0; h < kQueryHeads; ++h) {
            reinterpret_cast<float4*>(partial)[(warp * kQueryHeads + h) * 32 + lane] = sum[h0 + h];
          }
          __syncthreads();
#pragma unroll
          for (int e = t; e < kQueryHeads * 128; e += kQueryThreads) {
            if (start + e % 128 >= D) continue;
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < kQueryWarps; ++w) total += partial[w * kQueryHeads * 128 + e];
            y[(h0 + e / 128) * kMaxHeadDim + start + e % 128] = total;
          }
        }
      }
    } else {
      transform_queries<HEADS>(p, kv_head, x, y);
    }
    __syncthreads();
    // A warp a head: fold the scales of the tables in, split into two terms. Missing heads are
    // zero.
    const float* row = y + (warp < HEADS ? warp : 0) * kMaxHeadDim;
    const int dim = warp < pair.n_heads ? D : 0;
    uint8_t* rows =
        p.workspace + p.query_at + static_cast<int64_t>(pair.index) * 16 * p.query_row_bytes;
    uint8_t *high_row = rows + warp * p.query_row_bytes,
            *low_row = rows + (8 + warp) * p.query_row_bytes;
    float unit;
    if constexpr (kHalfK) {
      unit = split_16<false>(row, dim, p.query_row_bytes / 2, lane, high_row, low_row);
    } else {
      const float* scales =
          p.keys.scales +
          (static_cast<int64_t>(p.keys.n_sequences == 1 ? 0 : b) * p.n_kv_heads + kv_head) *
              key_padded_dim;
      float top = 0.0f, scaled[kMaxHeadDim / 32];
#pragma unroll
      for (int k = 0; k < kMaxHeadDim / 32; ++k) {
        const int d = lane + 32 * k;
        scaled[k] = d < dim ? row[d] * __ldg(scales + d / key_sub_dim) : 0.0f;
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
      reinterpret_cast<float*>(p.workspace + p.query_scale_at)[pair.index * 8 + warp] =
          unit * p.scale * kLog2e;
    }
  }
}

// DIM: head_dim, or what it is padded to. Grid: head groups x query_tiles, then pairs if there are
// exact tokens.
template <bool kHalfK, int HEADS, int DIM>
__global__ void __launch_bounds__(kQueryThreads, 2)
    query_kernel(const __grid_constant__ DecodeParams p, int key_padded_dim, int key_sub_dim) {
  extern __shared__ __align__(16) float query_shared[];
  const int tiles = query_tiles(p.batch, p.n_kv_heads * p.n_groups, p.n_ctas);
  const int exact = static_cast<int>(blockIdx.x) - tiles * p.n_kv_heads * p.n_groups;
  if (exact < 0) {
    const int head_group = blockIdx.x / tiles, tile = blockIdx.x - head_group * tiles;
    prepare_queries<kHalfK, HEADS>(p, head_group, divide_into(p.batch, tile, tiles),
                                   divide_into(p.batch, tile + 1, tiles), key_padded_dim,
                                   key_sub_dim, query_shared);
    return;
  }
  wait_for_stream();
  const Pair pair = pair_of(p, exact / p.batch, exact % p.batch);
  const int n_exact = p.n_exact[pair.sequence];
  if (n_exact == 0) return;
  load_queries<HEADS>(p, pair, query_shared);
  MergeSpace<HEADS, kQueryWarps> space;
  space.warps = query_shared + HEADS * kQueryStride;
  space.maximum = space.warps + kQueryWarps * HEADS * DIM;
  space.sum = space.maximum + kQueryWarps * HEADS;
  if (p.exact_bf16) {
    attend_exact<true, HEADS, DIM>(p, pair, n_exact, query_shared, kQueryStride, space);
  } else {
    attend_exact<false, HEADS, DIM>(p, pair, n_exact, query_shared, kQueryStride, space);
  }
  merge_warps(space, p.head_dim, 1.0f,
              reinterpret_cast<float*>(p.workspace + p.exact_at) +
                  pair.index * partial_floats(HEADS, p.head_dim));
}

}  // namespace veloxquant::attention::cuda
