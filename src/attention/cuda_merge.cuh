// The results of an item's warps -> a record; the records of a pair -> out and log-sum-exp.
//
// An item that is all of its pair keeps its record in shared memory. Otherwise records lie in the
// scratch, and the CTA that leaves the last one of a pair puts them together, always in the order
// of the parts, while its share of the inverse transform's matrix is on the way.
#pragma once

#include "src/attention/cuda_cut.cuh"
#include "src/attention/cuda_matrix.cuh"

namespace veloxquant::attention::cuda {

// A sum of parts, by a thread for four dimensions of a head.
struct Part {
  float top = kNothing, sum = 0.0f;
  float4 quad = {0.0f, 0.0f, 0.0f, 0.0f};
};

// Results first .. first + n - 1 of a head -> one: a thread's four dimensions, maximum and sum.
template <class S>
__device__ __forceinline__ Part merge_results(int first, int n, int h, int slot, int slots,
                                              float unit, const Results<S>& results) {
  const float* tops = results.tops + h * kWeights + first;
  const float* sums = results.sums + h * kWeights + first;
  const float4* rows = reinterpret_cast<const float4*>(results.rows) + first * slots + slot;
  static_assert(S::WARPS % 4 == 0 && kWeights % 4 == 0);  // four at a time, and whole
  float top[S::WARPS], of[S::WARPS];
#pragma unroll
  for (int w = 0; w < S::WARPS; w += 4) {
    *reinterpret_cast<float4*>(top + w) = *reinterpret_cast<const float4*>(tops + w);
    *reinterpret_cast<float4*>(of + w) = *reinterpret_cast<const float4*>(sums + w);
  }
  Part part;
#pragma unroll
  for (int w = 0; w < S::WARPS; ++w) {
    if (w < n) part.top = fmaxf(part.top, top[w]);
  }
#pragma unroll
  for (int w = 0; w < S::WARPS; ++w) {
    if (w < n) {
      const float weight = exp2_fast(top[w] - part.top) * unit;
      part.sum = fmaf(weight, of[w], part.sum);
      add_scaled(part.quad, weight, rows[w * slots]);
    }
  }
  return part;
}

// Where a part of the item's pair leaves its record.
template <class S>
__device__ __forceinline__ float* record_of(const DecodeParams& p, const Item& item, int part) {
  return reinterpret_cast<float*>(p.workspace + p.records_at) +
         (item.index + part) * record_floats(S::HEADS, S::head_dim(p));
}

// A thread's share of an item's record, once all results are there: rows [2][HEADS][D] and tops
// [4][HEADS] (packed maximum, packed sum, the exact ones), in its slot where it is all of its pair.
template <class S>
__device__ __forceinline__ void merge_warps(const DecodeParams& p, const Item& item, int more_exact,
                                            const Slot<S>& slot_of_item,
                                            const Results<S>& results) {
  constexpr int HEADS = S::HEADS;
  constexpr float kUnit = S::kValue != kInt8 ? 1.0f : 1.5279e-5f;  // 2^-15.998
  const int quads = S::head_dim(p) / 4, slots = HEADS * quads;
  const Deal<S> deal(item, more_exact);
  const bool alone = item.n_parts == 1;
  float* const rows = alone ? slot_of_item.record() : record_of<S>(p, item, item.part);
  float* const tops = alone ? slot_of_item.tops() : rows + 2 * HEADS * S::head_dim(p);
#pragma unroll 1
  for (int e = threadIdx.x; e < 2 * slots; e += S::THREADS) {
    const bool exact = e >= slots;
    const int slot = exact ? e - slots : e, h = slot / quads;
    const Part part = merge_results<S>(exact ? S::WARPS : 0, exact ? deal.exact : deal.n_results(),
                                       h, slot, slots, exact ? 1.0f : kUnit, results);
    float4* to = reinterpret_cast<float4*>(rows) + e;
    float* top = tops + (exact ? 2 * HEADS : 0) + h;
    const bool is_first = slot == h * quads;
    if (alone) {
      *to = part.quad;
      if (is_first) top[0] = part.top, top[HEADS] = part.sum;
    } else {
      __stcg(to, part.quad);
      if (is_first) __stcg(top, part.top), __stcg(top + HEADS, part.sum);
    }
  }
}

// Whether this CTA leaves the last record of a pair. The counter is 0 again after that.
__device__ __forceinline__ bool leaves_last(const DecodeParams& p, const Item& item) {
  __syncthreads();
  int last = 0;
  if (threadIdx.x == 0) {
    auto* counter = reinterpret_cast<unsigned long long*>(p.workspace) + item.index;
    // The record is seen before it is counted, and those counted before are seen after.
    const unsigned long long before = ptx::count_one(counter);
    last = (before & kCounterBits) == static_cast<unsigned>(item.n_parts - 1);
    if (last != 0) *counter = kCounterMark;
  }
  return same_in_warp(__syncthreads_or(last)) != 0;
}

// All records of a pair -> to[groups + 1][HEADS][D] and tops[groups + 1][2][HEADS] (maximum, sum):
// `groups` shares of the packed parts, then the exact ones.
template <class S>
__device__ __forceinline__ void gather_records(const DecodeParams& p, const Item& item,
                                               const float* records, float* to,
                                               const Shared<S>& shared) {
  constexpr int HEADS = S::HEADS, kAhead = 8, kGroups = S::kGroups;
  const int D = S::head_dim(p), quads = D / 4, slots = HEADS * quads;
  const int size = static_cast<int>(record_floats(HEADS, D));
#pragma unroll 1
  for (int e = threadIdx.x; e < (kGroups + 1) * slots; e += S::THREADS) {
    const int g = e / slots, slot = e - g * slots, h = slot / quads;
    const bool exact = g == kGroups;
    const int n = exact && item.n_exact == 0 ? 0 : item.n_parts, step = exact ? 1 : kGroups;
    const float* rows = records + (exact ? HEADS * D : 0) + 4 * slot;
    const float* tops = records + 2 * HEADS * D + (exact ? 2 * HEADS : 0) + h;
    Part sum;
#pragma unroll 1
    for (int begin = exact ? Cut::parts_before_exact(item) : g; begin < n; begin += kAhead * step) {
      Part part[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int at = begin + k * step;
        if (at < n) {
          part[k].top = __ldcg(tops + at * size);
          part[k].sum = __ldcg(tops + at * size + HEADS);
          part[k].quad = __ldcg(reinterpret_cast<const float4*>(rows + at * size));
        }
      }
      float next = sum.top;
#pragma unroll
      for (int k = 0; k < kAhead; ++k) next = fmaxf(next, part[k].top);
      const float keep = exp2_fast(sum.top - next);
      sum.top = next;
      sum.sum *= keep;
      sum.quad =
          make_float4(sum.quad.x * keep, sum.quad.y * keep, sum.quad.z * keep, sum.quad.w * keep);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const float weight = exp2_fast(part[k].top - next);
        sum.sum = fmaf(weight, part[k].sum, sum.sum);
        add_scaled(sum.quad, weight, part[k].quad);
      }
    }
    reinterpret_cast<float4*>(to)[e] = sum.quad;
    if (slot == h * quads) {
      shared.merged_tops()[2 * g * HEADS + h] = sum.top;
      shared.merged_tops()[(2 * g + 1) * HEADS + h] = sum.sum;
    }
  }
}

// `groups` sums of the group's i-th item -> its columns of shared.output, in codec coordinates,
// what its exact tokens add, and the log-sum-exp.
template <class S>
__device__ __forceinline__ void join_sums(const DecodeParams& p, const Pair& pair, int i,
                                          int groups, const float* sums, const float* all_tops,
                                          const Shared<S>& shared) {
  constexpr int HEADS = S::HEADS;
  const int D = S::head_dim(p), quads = D / 4, slots = HEADS * quads;
  const int64_t row = static_cast<int64_t>(pair.sequence) * p.n_q_heads + pair.first_head;
  for (int slot = threadIdx.x; slot < pair.n_heads * quads; slot += S::THREADS) {
    const int h = slot / quads, d = 4 * (slot - h * quads);
    // The last group is the exact tokens'.
    const float* tops = all_tops + h;
    float both = tops[2 * groups * HEADS];
    for (int g = 0; g < groups; ++g) both = fmaxf(both, tops[2 * g * HEADS]);
    const float exact_weight = exp2_fast(tops[2 * groups * HEADS] - both);
    float total = exact_weight * tops[(2 * groups + 1) * HEADS];
    float4 packed = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int g = 0; g < groups; ++g) {
      const float weight = exp2_fast(tops[2 * g * HEADS] - both);
      total = fmaf(weight, tops[(2 * g + 1) * HEADS], total);
      add_scaled(packed, weight, reinterpret_cast<const float4*>(sums)[g * slots + slot]);
    }
    const float4 exact = reinterpret_cast<const float4*>(sums)[groups * slots + slot];
    const float inverse = total > 0.0f ? reciprocal(total) : 0.0f;
    const float keep = inverse * exact_weight;
    const float low = inverse * shared.value_scales()[d / S::kValueSub],
                high = inverse * shared.value_scales()[(d + 2) / S::kValueSub];
    const int column = i * pair.n_heads + h;
    float* x = shared.output + place_of<S>(column, d);
    x[0] = packed.x * low;
    x[4] = packed.y * low;
    x[8] = packed.z * high;
    x[12] = packed.w * high;
    *reinterpret_cast<float4*>(shared.turned + column * S::DIM + d) =
        make_float4(exact.x * keep, exact.y * keep, exact.z * keep, exact.w * keep);
    if (d == 0 && p.lse != nullptr)
      p.lse[row + h] = total > 0.0f ? (both + __log2f(total)) * kLn2 : -INFINITY;
  }
}

// The columns of the group's n items -> out, of those whose bit is set. Between barriers.
template <class S>
__device__ __forceinline__ void write_outputs(const DecodeParams& p, const Group& group, int n,
                                              unsigned finished, const Shared<S>& shared) {
  const Pair& head = group.items[0].pair;
  const int D = S::head_dim(p), n_heads = head.n_heads, n_columns = n * n_heads;
  const bool dense = p.values.matrix != nullptr;
  const float* lambda = nullptr;
  if (dense) {
    multiply_matrix<S, S::WARPS>(p, p.values, head.kv_head, shared.output, n_columns, shared);
    __syncthreads();
  } else if (p.values.hadamard) {
    hadamard_heads<S, S::WARPS>(shared.output, n_columns, D);
    if (p.values.lambda != nullptr) lambda = p.values.lambda + head.kv_head * D;
  }
  for (int e = 2 * threadIdx.x; e < n_columns * D; e += 2 * S::THREADS) {
    const int c = e / D, d = e - c * D;
    const Column column(c, n_heads);
    if ((finished >> column.item & 1) == 0) continue;
    float2 y;
    if (dense) {
      y = add_groups<S, S::WARPS>(shared.area, D, c, d);
    } else {
      y = make_float2(shared.output[place_of<S>(c, d)], shared.output[place_of<S>(c, d + 1)]);
      if (lambda != nullptr) {
        y.x *= __ldg(lambda + d);
        y.y *= __ldg(lambda + d + 1);
      }
    }
    const float2 exact = *reinterpret_cast<const float2*>(shared.turned + c * S::DIM + d);
    y.x += exact.x;
    y.y += exact.y;
    const int64_t row = static_cast<int64_t>(group.items[column.item].pair.sequence) * p.n_q_heads +
                        head.first_head + column.head;
    store_pair(p.out, row * D + d, p.out_type, y);
  }
}

}  // namespace veloxquant::attention::cuda
