// Transforms of the heads of a group: dense, with the matrix in registers before the vectors are
// known, or Hadamard, in place.
#pragma once

#include "src/attention/cuda_shape.cuh"

namespace veloxquant::attention::cuda {

// Of a side that has one.
__device__ __forceinline__ const uint4* matrix_of(const SideView& side, int kv_head, int D) {
  return static_cast<const uint4*>(side.matrix) + static_cast<int64_t>(kv_head) * (D * D / 4);
}

// Where a column of a group's transforms comes from: item and head. Items have `n_heads` each.
struct Column {
  int item, head;

  __device__ __forceinline__ Column(int column, int n_heads)
      : item(quotient(column, n_heads)), head(column - item * n_heads) {}
};

// Vectors of a group in shared.turned or shared.output, kColumns side by side: fp32 where the
// transform is in place or none.
template <class S>
__device__ __forceinline__ int place_of(int column, int d) {
  return d * S::kColumns + column;
}
// For a dense one: dimensions d, d + 1 as two terms in bf16, operand A of its product, the pair's
// columns in an order such that neither those who write nor those who read meet in a bank.
__device__ __forceinline__ int place_of_terms(int column, int pair) {
  return 8 * pair + (column ^ ((pair & 2) << 1 | (pair & 4) >> 1 | (pair & 8) >> 3));
}
__device__ __forceinline__ void store_terms(float* vectors, int column, int d, float2 x) {
  const uint32_t high = pack_16<true>(x.x, x.y);
  const float2 taken = unpack_16<true>(high);
  reinterpret_cast<uint2*>(vectors)[place_of_terms(column, d / 2)] =
      make_uint2(high, pack_16<true>(x.x - taken.x, x.y - taken.y));
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

// The matrix of a group's outputs on its way to shared memory. Nothing where there is none, or no
// room.
template <class S>
struct Staging {
  // One warp; a barrier must follow.
  __device__ __forceinline__ static void begin(const Shared<S>& shared) {
    ptx::begin_bulk_copies(shared.arrival(), 32 * S::kPlanWarp);
    ptx::begin_arrivals(shared.done(), S::WARPS);
    __syncwarp();
  }

  // All threads; nobody reads the one before any more.
  __device__ __forceinline__ static void send(const DecodeParams& p, int kv_head,
                                              const Shared<S>& shared) {
    if (!Shared<S>::kHasMatrix || p.values.matrix == nullptr) return;
    const int head_dim = S::head_dim(p);
    ptx::copy_bulk<32 * S::kPlanWarp>(
        static_cast<uint32_t>(__cvta_generic_to_shared(shared.matrix)),
        matrix_of(p.values, kv_head, head_dim), 4 * head_dim * head_dim, shared.arrival());
  }

  // That of the `number`-th group is there.
  __device__ __forceinline__ static void wait(const DecodeParams& p, int number,
                                              const Shared<S>& shared) {
    if (!Shared<S>::kHasMatrix || p.values.matrix == nullptr) return;
    ptx::wait_for_phase(shared.arrival(), number + 1);
  }
};

// A warp's tile of a dense transform's matrix, 16 columns: there are as many warps as tiles. Of
// more than 128 rows, for which registers have no room, a warp takes tile after tile and loads
// where it multiplies.
template <class S>
struct Tile {
  static constexpr int kSteps = S::DIM / 16, kBatch = kSteps <= 8 ? kSteps : 4;
  static constexpr bool kHeld = kBatch == kSteps;
  uint4 m[2 * kBatch];

  // Steps first .. first + kBatch - 1, of `tiles`.
  template <class Load>
  __device__ __forceinline__ void load(int tile, int tiles, int first, Load load) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < 2 * kBatch; ++k) {
      const int at = min(2 * first + k, 2 * tiles - 1);
      m[k] = load((tile * 2 * tiles + at) * 32 + lane);
    }
  }
  // What is not set anywhere would be kept in registers, or spilled, from the kernel's beginning.
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < 2 * kBatch; ++k) m[k] = make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void fetch(const DecodeParams& p, const SideView& side, int kv_head) {
    const int tile = ptx::afresh(threadIdx.x) >> 5, tiles = S::head_dim(p) / 16;
    if (!kHeld || side.matrix == nullptr || tile >= tiles) return clear();
    const uint4* matrix = matrix_of(side, kv_head, S::head_dim(p));
    load(tile, tiles, 0, [&](int at) { return ptx::load_now(matrix + at); });
  }
  __device__ __forceinline__ void fetch_staged(const DecodeParams& p, int kv_head,
                                               const Shared<S>& shared) {
    if constexpr (Shared<S>::kHasMatrix) {
      const int tile = ptx::afresh(threadIdx.x) >> 5, tiles = S::head_dim(p) / 16;
      if (p.values.matrix == nullptr || tile >= tiles) return clear();
      load(tile, tiles, 0, [&](int at) { return shared.matrix[at]; });
    } else {
      fetch(p, p.values, kv_head);
    }
  }

  // Vectors of store_terms -> shared.area, [kColumns][DIM], by tensor cores: rows g are high terms
  // of the columns, rows g + 8 low ones, and the matrix has two terms as well. By the first kWarps
  // warps; what columns that are none hold is nobody's.
  template <int kWarps>
  __device__ __forceinline__ void multiply(const DecodeParams& p, const SideView& side, int kv_head,
                                           const float* vectors, const Shared<S>& shared) {
    static_assert(S::kColumns == 8 && (!kHeld || kWarps >= kSteps));
    const int D = S::head_dim(p), tiles = D / 16;
    const int lane = threadIdx.x & 31, g = lane >> 2, i = lane & 3;
    const auto* x = reinterpret_cast<const uint2*>(vectors);
#pragma unroll 1
    for (int tile = ptx::afresh(threadIdx.x) >> 5; tile < tiles; tile += kWarps) {
      float c[2][2][4] = {};  // of the matrix' high and low terms
#pragma unroll
      for (int first = 0; first < kSteps; first += kBatch) {
        uint2 a[kBatch], b[kBatch];
        if constexpr (!kHeld) {
          const uint4* matrix = matrix_of(side, kv_head, D);
          load(tile, tiles, first, [&](int at) { return __ldg(matrix + at); });
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int pair = 8 * (first + k) + i;
          a[k] = x[place_of_terms(g, pair)];
          b[k] = x[place_of_terms(g, pair + 4)];
          if (first + k >= tiles) a[k] = b[k] = make_uint2(0, 0);
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint4& w = m[2 * k + half];
            ptx::mma_bf16(c[half][0], a[k].x, a[k].y, b[k].x, b[k].y, w.x, w.y);
            ptx::mma_bf16(c[half][1], a[k].x, a[k].y, b[k].x, b[k].y, w.z, w.w);
          }
        }
      }
      const auto sum = [&](int half, int k) {
        return c[half][0][k] + c[half][0][2 + k] + (c[half][1][k] + c[half][1][2 + k]);
      };
      *reinterpret_cast<float4*>(shared.area + g * S::DIM + 16 * tile + 4 * i) =
          make_float4(sum(0, 0), sum(0, 1), sum(1, 0), sum(1, 1));
      if constexpr (kHeld) break;
    }
  }
};

// Vectors in place, without the scale, by the first kWarps warps; between barriers, and
// one follows.
template <class S, int kWarps>
__device__ __forceinline__ void hadamard_heads(float* x, int head_dim) {
  constexpr int kColumns = S::kColumns;
#pragma unroll 1
  for (int start = 0; start < head_dim;) {
    const int block = hadamard_block(head_dim - start);
    const float scale = hadamard_scale(block);
#pragma unroll 1
    for (int stride = 1; stride < block; stride *= 2) {
      const float unit = 2 * stride == block ? scale : 1.0f;
      for (int e = threadIdx.x; e < kColumns * block / 2; e += 32 * kWarps) {
        const int k = e / kColumns;
        float* low = x + place_of<S>(e % kColumns, start + 2 * stride * (k / stride) + k % stride);
        const float a = low[0], c = low[kColumns * stride];
        low[0] = (a + c) * unit;
        low[kColumns * stride] = (a - c) * unit;
      }
      sync_warps<S, kWarps>();
    }
    start += block;
  }
}

}  // namespace veloxquant::attention::cuda
