// The queries of a pair -> operand rows of the scores, in shared memory.
//
// Rows [2 terms][HEADS][kRowBytes] in codec coordinates: int8 entries take q as 256 high + low,
// both int8; half entries as a sum of two fp16. The units undo the normalisation and carry scale *
// log2(e).
#pragma once

#include "src/attention/cuda_cut.cuh"
#include "src/attention/cuda_exact.cuh"
#include "src/attention/cuda_matrix.cuh"

namespace veloxquant::attention::cuda {

// The queries of a pair on their way to shared memory, zero for heads that are none and up to DIM.
// By the first kQueryWarps warps, as all here.
template <class S>
struct Start {
  static constexpr int kThreads = 32 * S::kQueryWarps, kPairs = S::HEADS * S::DIM / 2,
                       kLoads = (kPairs + kThreads - 1) / kThreads;
  float2 x[kLoads];

  __device__ __forceinline__ static Start fetch(const DecodeParams& p, const Pair& pair) {
    Start start;
    const int D = S::head_dim(p), t = threadIdx.x;
    const int64_t row = (static_cast<int64_t>(pair.sequence) * p.n_q_heads + pair.first_head) * D;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int e = t + k * kThreads, h = e / (S::DIM / 2), d = 2 * (e % (S::DIM / 2));
      start.x[k] = make_float2(0.0f, 0.0f);
      if (h < pair.n_heads && d < D) start.x[k] = load_pair(p.q, row + h * D + d, p.q_type);
    }
    return start;
  }

  __device__ __forceinline__ void store(const DecodeParams& p, const Pair& pair,
                                        const Shared<S>& shared) const {
    const int D = S::head_dim(p), t = threadIdx.x;
    const float* lambda =
        p.keys.hadamard && p.keys.lambda != nullptr ? p.keys.lambda + pair.kv_head * D : nullptr;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int e = t + k * kThreads, h = e / (S::DIM / 2), d = 2 * (e % (S::DIM / 2));
      if (e >= kPairs) break;
      float2 y = x[k];
      *reinterpret_cast<float2*>(shared.queries() + h * Shared<S>::kQueryStride + d) = y;
      if (lambda != nullptr && d < D) {
        y.x *= __ldg(lambda + d);
        y.y *= __ldg(lambda + d + 1);
      }
      shared.turned[d * S::HEADS + h] = y.x;
      shared.turned[(d + 1) * S::HEADS + h] = y.y;
    }
  }
};

// One thread, before its CTA counts a record of the item: whatever the pair's counter was is 0.
__device__ __forceinline__ void prepare_counter(const DecodeParams& p, const Item& item) {
  if (item.n_parts == 1) return;
  auto* counter = reinterpret_cast<unsigned long long*>(p.workspace) + item.index;
  const unsigned long long count = __ldcg(counter);
  if ((count & ~kCounterBits) != kCounterMark) atomicCAS(counter, count, kCounterMark);
}

// A warp: a head's row as two terms; values d, d + 1 for d = 2 lane + 64 k.
template <class S>
__device__ __forceinline__ float split_query(float2 (&x)[(S::DIM + 63) / 64], uint8_t* high_row,
                                             uint8_t* low_row, const float* scales) {
  constexpr int kPairs = (S::DIM + 63) / 64;
  const int lane = threadIdx.x & 31;
  float top = 0.0f;
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    if constexpr (S::kKey == kInt8) {
      const int d = min(2 * lane + 64 * k, S::DIM - 2);
      x[k].x *= scales[d / S::kKeySub];
      x[k].y *= scales[d / S::kKeySub];
    }
    top = fmaxf(top, fmaxf(fabsf(x[k].x), fabsf(x[k].y)));
  }
  top = warp_largest(top);
  if constexpr (S::kKey == kHalf2) {
    const int exponent = exponent_of(top);
    const float inverse = power_of_two(-exponent);
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const int d = 2 * lane + 64 * k;
      if (d >= S::DIM) break;
      const float a = x[k].x * inverse, b = x[k].y * inverse;
      const uint32_t high = pack_16<false>(a, b);
      const float2 taken = unpack_16<false>(high);
      reinterpret_cast<uint32_t*>(high_row)[d / 2] = high;
      reinterpret_cast<uint32_t*>(low_row)[d / 2] = pack_16<false>(a - taken.x, b - taken.y);
    }
    return power_of_two(exponent);
  } else {
    constexpr float kLargest = 32639.0f;  // so that the high term is at most 127
    const float inverse = top > 0.0f ? kLargest * reciprocal(top) : 0.0f;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const int d = 2 * lane + 64 * k;
      if (d >= S::DIM) break;
      const int a = max(-32639, min(32639, __float2int_rn(x[k].x * inverse)));
      const int b = max(-32639, min(32639, __float2int_rn(x[k].y * inverse)));
      const int high_a = (a + 128) >> 8, high_b = (b + 128) >> 8;
      reinterpret_cast<uint16_t*>(high_row)[d / 2] =
          static_cast<uint16_t>((high_a & 255) | (high_b & 255) << 8);
      reinterpret_cast<uint16_t*>(low_row)[d / 2] =
          static_cast<uint16_t>(((a - 256 * high_a) & 255) | ((b - 256 * high_b) & 255) << 8);
    }
    return fmaxf(top * (1.0f / kLargest), 1e-30f);  // never 0: a masked score is -inf times it
  }
}

// A barrier of all must follow before the rows are read. Writes over `shared.rows`.
template <class S>
__device__ __forceinline__ void prepare_queries(const DecodeParams& p, const Pair& pair,
                                                const Shared<S>& shared) {
  constexpr int kWarps = S::kQueryWarps;
  const int D = S::head_dim(p), lane = threadIdx.x & 31;
  ptx::wait_for_copies();
  sync_warps<S, kWarps>();
  if (p.keys.matrix != nullptr) {
    multiply_matrix<S, kWarps>(p, p.keys, pair.kv_head, shared.turned, shared);
    sync_warps<S, kWarps>();
  } else if (p.keys.hadamard) {
    hadamard_heads<S, kWarps>(shared.turned, D);
  }
#pragma unroll 1
  for (int h = threadIdx.x >> 5; h < S::HEADS; h += kWarps) {
    float2 x[(S::DIM + 63) / 64];
#pragma unroll
    for (int k = 0; k < (S::DIM + 63) / 64; ++k) {
      const int d = 2 * lane + 64 * k;
      x[k] = make_float2(0.0f, 0.0f);
      if (d >= D) continue;
      if (p.keys.matrix != nullptr) {
        x[k] = add_groups<S, kWarps>(shared.rows, D, h, d);
      } else {
        x[k] = make_float2(shared.turned[d * S::HEADS + h], shared.turned[(d + 1) * S::HEADS + h]);
      }
    }
    const float unit =
        split_query<S>(x, shared.operand() + h * S::kRowBytes,
                       shared.operand() + (S::HEADS + h) * S::kRowBytes, shared.key_scales());
    if (lane == 0) shared.units()[h] = unit * p.scale * kLog2e;
  }
}

}  // namespace veloxquant::attention::cuda
