// Transforms of the heads of a pair: dense, with the matrix on its way to
// shared memory before the vectors are known, or Hadamard, in place.
#pragma once

#include "src/attention/cuda_shape.cuh"

namespace veloxquant::attention::cuda {

// Of a side that has one.
__device__ __forceinline__ const float* matrix_of(const SideView& side, int kv_head, int D) {
  return side.matrix + static_cast<int64_t>(kv_head) * D * D;
}

// Where a column of a group's transforms comes from: item and head. Items have `n_heads` each.
struct Column {
  int item, head;

  __device__ __forceinline__ Column(int column, int n_heads)
      : item(quotient(column, n_heads)), head(column - item * n_heads) {}
};

// A number of a column in shared.turned or shared.output, where four columns lie side by side.
template <class S>
__device__ __forceinline__ int place_of(int column, int d) {
  return ((column >> 2) * S::DIM + d) * 4 + (column & 3);
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

// Transforms' matrices on their way to shared memory, one after the other in the same place.
// Nothing where there is none, or no room.
template <class S>
struct Staging {
  // One warp; a barrier must follow.
  __device__ __forceinline__ static void begin(const Shared<S>& shared) {
    ptx::begin_bulk_copies(shared.arrival(), 32 * S::kQueryWarps);
    ptx::begin_arrivals(shared.done(), S::WARPS);
    __syncwarp();
  }

  // All threads; nobody reads the one before any more.
  __device__ __forceinline__ static void send(const DecodeParams& p, const SideView& side,
                                              int kv_head, const Shared<S>& shared) {
    if (!Shared<S>::kHasMatrix || side.matrix == nullptr) return;
    const int head_dim = S::head_dim(p);
    ptx::copy_bulk<32 * S::kQueryWarps>(
        static_cast<uint32_t>(__cvta_generic_to_shared(shared.matrix)),
        matrix_of(side, kv_head, head_dim), 4 * head_dim * head_dim, shared.arrival());
  }

  // That of the `number`-th group's queries, or of its outputs, is there. A group has both, and so
  // two phases, or one that serves for either.
  __device__ __forceinline__ static void wait(const DecodeParams& p, int number, bool outputs,
                                              const Shared<S>& shared) {
    const bool keys = p.keys.matrix != nullptr, values = p.values.matrix != nullptr;
    if (!Shared<S>::kHasMatrix || !(keys || values)) return;
    ptx::wait_for_phase(shared.arrival(), keys && values ? 2 * number + 1 + outputs : number + 1);
  }
};

// x[passes][DIM][4] -> shared.area, [passes][groups][4][D], each group's share of the sums, of the
// first n_columns columns. From shared memory where the matrix was staged there. By the first
// kWarps warps.
template <class S, int kWarps>
__device__ __forceinline__ void multiply_matrix(const DecodeParams& p, const SideView& side,
                                                int kv_head, const float* x, int n_columns,
                                                const Shared<S>& shared) {
  const int head_dim = S::head_dim(p);
  const float* matrix = Shared<S>::kHasMatrix ? shared.matrix : matrix_of(side, kv_head, head_dim);
  const int quads = head_dim / 4, n = matrix_groups(kWarps, head_dim);
  const int quad = threadIdx.x % quads, group = threadIdx.x / quads;
  if (group >= n) return;
  constexpr int kAhead =
      kWarps == S::WARPS ? 11 : 12;  // of a thread's rows, for up to 128 dimensions all
#pragma unroll 1
  for (int pass = 0; 4 * pass < n_columns; ++pass) {
    const float4* from = reinterpret_cast<const float4*>(matrix) + group * quads + quad;
    const float4* of = reinterpret_cast<const float4*>(x) + pass * S::DIM + group;
    float4 sum[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (int begin = group; begin < head_dim; begin += kAhead * n) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (begin + k * n >= head_dim) break;
        const float4 m = from[k * n * quads], y = of[k * n];
        add_scaled(sum[0], y.x, m);
        add_scaled(sum[1], y.y, m);
        add_scaled(sum[2], y.z, m);
        add_scaled(sum[3], y.w, m);
      }
      from += kAhead * n * quads;
      of += kAhead * n;
    }
    float4* to = reinterpret_cast<float4*>(shared.area) + ((pass * n + group) * 4) * quads + quad;
#pragma unroll
    for (int c = 0; c < 4; ++c) to[c * quads] = sum[c];
  }
}

// The share sums above, in order: dimensions d and d + 1 of a column.
template <class S, int kWarps>
__device__ __forceinline__ float2 add_groups(const float* shares, int head_dim, int column, int d) {
  const int n = matrix_groups(kWarps, head_dim);
  shares += ((column >> 2) * n * 4 + (column & 3)) * head_dim + d;
  float2 total = make_float2(0.0f, 0.0f);
#pragma unroll 12
  for (int g = 0; g < n; ++g) {
    const float2 x = *reinterpret_cast<const float2*>(shares + g * 4 * head_dim);
    total.x += x.x;
    total.y += x.y;
  }
  return total;
}

// x[passes][DIM][4] in place, without the scale, by the first kWarps warps; between barriers, and
// one follows.
template <class S, int kWarps>
__device__ __forceinline__ void hadamard_heads(float* x, int n_columns, int head_dim) {
  const int passes = (n_columns + 3) / 4;
#pragma unroll 1
  for (int start = 0; start < head_dim;) {
    const int block = hadamard_block(head_dim - start);
    const float scale = hadamard_scale(block);
#pragma unroll 1
    for (int stride = 1; stride < block; stride *= 2) {
      const float unit = 2 * stride == block ? scale : 1.0f;
      for (int e = threadIdx.x; e < passes * 2 * block; e += 32 * kWarps) {
        const int pass = e / (2 * block), k = e / 4 - pass * (block / 2);
        float* low =
            x + 4 * (pass * S::DIM + start + 2 * stride * (k / stride) + k % stride) + e % 4;
        const float a = low[0], c = low[4 * stride];
        low[0] = (a + c) * unit;
        low[4 * stride] = (a - c) * unit;
      }
      sync_warps<S, kWarps>();
    }
    start += block;
  }
}

}  // namespace veloxquant::attention::cuda
