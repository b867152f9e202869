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

// The queries of a group on their way to shared memory, zero in columns that are none and up to
// DIM. By the first kQueryWarps warps, as all here.
template <class S>
struct Start {
  static constexpr int kThreads = 32 * S::kQueryWarps, kPairs = S::kColumns * S::DIM / 2,
                       kLoads = (kPairs + kThreads - 1) / kThreads;
  float2 x[kLoads];

  // `n` items of the head of `pair`; sequence_of(i): of the i-th.
  template <class SequenceOf>
  __device__ __forceinline__ static Start fetch(const DecodeParams& p, const Pair& pair, int n,
                                                SequenceOf sequence_of) {
    Start start;
    const int D = S::head_dim(p), t = threadIdx.x;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int e = t + k * kThreads, d = 2 * (e % (S::DIM / 2));
      const Column column(e / (S::DIM / 2), pair.n_heads);
      start.x[k] = make_float2(0.0f, 0.0f);
      if (column.item < n && e < kPairs && d < D) {
        const int64_t row = static_cast<int64_t>(sequence_of(column.item)) * p.n_q_heads +
                            pair.first_head + column.head;
        start.x[k] = load_pair(p.q, row * D + d, p.q_type);
      }
    }
    return start;
  }

  __device__ __forceinline__ void store(const DecodeParams& p, const Pair& pair, int n,
                                        const Shared<S>& shared) const {
    const int D = S::head_dim(p), t = threadIdx.x;
    const float* lambda =
        p.keys.hadamard && p.keys.lambda != nullptr ? p.keys.lambda + pair.kv_head * D : nullptr;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int e = t + k * kThreads, c = e / (S::DIM / 2), d = 2 * (e % (S::DIM / 2));
      if (e >= kPairs) break;
      const Column column(c, pair.n_heads);
      float2 y = x[k];
      if (column.item < n) {
        *reinterpret_cast<float2*>(shared.slot(column.item).queries() +
                                   column.head * Slot<S>::kQueryStride + d) = y;
      }
      if (lambda != nullptr && d < D) {
        y.x *= __ldg(lambda + d);
        y.y *= __ldg(lambda + d + 1);
      }
      if (p.keys.matrix != nullptr) {
        store_terms(shared.turned, c, d, y);
      } else {
        shared.turned[place_of<S>(c, d)] = y.x;
        shared.turned[place_of<S>(c, d + 1)] = y.y;
      }
    }
    // Operand rows of heads that are none.
    constexpr int kWords = S::kRowBytes / 4;
    const int none = S::HEADS - pair.n_heads, all = n * none * 2 * kWords;
#pragma unroll 1
    for (int e = t; e < all; e += kThreads) {
      const int row = e / kWords, i = quotient(row, 2 * none), at = row - i * 2 * none;
      const int term = at >= none, h = pair.n_heads + at - term * none;
      const Slot<S> slot = shared.slot(i);
      reinterpret_cast<uint32_t*>(slot.operand())[(term * S::HEADS + h) * kWords + e % kWords] = 0;
      slot.units()[h] = 1e-30f;
    }
  }
};

// One warp, before its CTA counts records of the items: whatever a pair's counter was is 0.
__device__ __forceinline__ void prepare_counters(const DecodeParams& p, const Group& group) {
  const int lane = threadIdx.x & 31;
  const Item& item = group.items[min(lane, group.n - 1)];
  auto* counter = reinterpret_cast<unsigned long long*>(p.workspace) + item.index;
  ptx::mark(counter, lane < group.n && item.n_parts > 1, kCounterMark, kCounterBits);
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
    return split_16<false, S>(x, top, reinterpret_cast<uint32_t*>(high_row),
                              reinterpret_cast<uint32_t*>(low_row));
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

// Of `n` items of the head of `pair`. A barrier of all must follow before the rows are read. Writes
// over `shared.area`.
template <class S>
__device__ __forceinline__ void prepare_queries(const DecodeParams& p, const Pair& pair, int n,
                                                Tile<S>& tile, const Shared<S>& shared) {
  constexpr int kWarps = S::kQueryWarps;
  const int D = S::head_dim(p), lane = threadIdx.x & 31, n_columns = n * pair.n_heads;
  sync_warps<S, kWarps>();
  // A task: a head's operand rows or its query in 16 bits. Whose, is asked before the transform, so
  // that nothing waits for it behind.
  int task = threadIdx.x >> 5;
  const auto column_of = [&](int task) {
    return Column(task < n_columns ? task : task - n_columns, pair.n_heads);
  };
  Column column = column_of(task);
  if (p.keys.matrix != nullptr) {
    tile.template multiply<kWarps>(p, p.keys, pair.kv_head, shared.turned, shared);
    sync_warps<S, kWarps>();
  } else if (p.keys.hadamard) {
    hadamard_heads<S, kWarps>(shared.turned, D);
  }
#pragma unroll 1
  for (; task < 2 * n_columns; task += kWarps, column = column_of(task)) {
    const bool exact = task >= n_columns;
    const int c = exact ? task - n_columns : task;
    const Slot<S> slot = shared.slot(column.item);
    const int h = column.head;
    if (exact) {
      float* row = slot.queries() + h * Slot<S>::kQueryStride;
      const float unit = pack_exact_query<S::kBf16, S>(row);
      if (lane == 0) slot.units()[S::HEADS + h] = unit * p.scale * kLog2e;
      continue;
    }
    float2 x[(S::DIM + 63) / 64];
#pragma unroll
    for (int k = 0; k < (S::DIM + 63) / 64; ++k) {
      const int d = 2 * lane + 64 * k;
      x[k] = make_float2(0.0f, 0.0f);
      if (d >= D) continue;
      if (p.keys.matrix != nullptr) {
        x[k] = *reinterpret_cast<const float2*>(shared.area + c * S::DIM + d);
      } else {
        x[k] = make_float2(shared.turned[place_of<S>(c, d)], shared.turned[place_of<S>(c, d + 1)]);
      }
    }
    const float unit =
        split_query<S>(x, slot.operand() + h * S::kRowBytes,
                       slot.operand() + (S::HEADS + h) * S::kRowBytes, shared.key_scales());
    if (lane == 0) slot.units()[h] = unit * p.scale * kLog2e;
  }
}

}  // namespace veloxquant::attention::cuda
