// The results of an item's warps -> a record; the records of a pair -> out and log-sum-exp.
//
// An item that is all of its pair keeps its record in shared memory. Otherwise records lie in the
// scratch, and the CTA that leaves the last one of a pair puts them together, always in the order
// of the parts.
#pragma once

#include "src/attention/cuda_cut.cuh"
#include "src/attention/cuda_matrix.cuh"

namespace veloxquant::attention::cuda {

// A sum of parts: a thread's two or four dimensions of a head.
template <class V>
struct Part {
  float top = kNothing, sum = 0.0f;
  V x = {};
};

// Results first .. first + n - 1 of a head -> one. All loads are on their way before the first is
// waited for: of results that are none, the last one's row is read again, and counts nothing.
template <class S>
__device__ __forceinline__ Part<float4> merge_results(int first, int n, int h, int slot, int slots,
                                                      float unit, const Results<S>& results) {
  const float* tops = results.tops + h * kWeights + first;
  const float* sums = results.sums + h * kWeights + first;
  const float4* rows = reinterpret_cast<const float4*>(results.rows) + first * slots + slot;
  static_assert(S::WARPS % 4 == 0 && kWeights % 4 == 0);  // four at a time, and whole
  Part<float4> part;
  if (n <= 0) return part;
  float top[S::WARPS], of[S::WARPS];
#pragma unroll
  for (int w = 0; w < S::WARPS; w += 4) {
    *reinterpret_cast<float4*>(top + w) = *reinterpret_cast<const float4*>(tops + w);
    *reinterpret_cast<float4*>(of + w) = *reinterpret_cast<const float4*>(sums + w);
  }
  float4 row[S::WARPS];
#pragma unroll
  for (int w = 0; w < S::WARPS; ++w) row[w] = rows[min(w, n - 1) * slots];
#pragma unroll
  for (int w = 0; w < S::WARPS; ++w) {
    if (w >= n) top[w] = kNothing;
    part.top = fmaxf(part.top, top[w]);
  }
#pragma unroll
  for (int w = 0; w < S::WARPS; ++w) {
    const float weight = w < n ? exp2_fast(top[w] - part.top) * unit : 0.0f;
    part.sum = fmaf(weight, w < n ? of[w] : 0.0f, part.sum);
    add_scaled(part.x, weight, row[w]);
  }
  return part;
}

// Where a part of the item's pair leaves its record.
template <class S>
__device__ __forceinline__ float* record_of(const DecodeParams& p, const Item& item, int part) {
  return reinterpret_cast<float*>(p.workspace + p.records_at) +
         (item.index + part) * record_floats(S::HEADS, S::head_dim(p));
}

// A thread's share of an item's record, once all results are there: rows [2][HEADS][D] and of each
// maximum and sum, [2][HEADS][2], first packed tokens, then exact ones. In its slot where it is all
// of its pair.
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
    const Part<float4> part =
        merge_results<S>(exact ? S::WARPS : 0, exact ? deal.exact : deal.n_results(), h, slot,
                         slots, exact ? 1.0f : kUnit, results);
    float4* to = reinterpret_cast<float4*>(rows) + e;
    float2* top = reinterpret_cast<float2*>(tops) + (exact ? HEADS : 0) + h;
    const bool is_first = slot == h * quads;
    if (alone) {
      *to = part.x;
      if (is_first) *top = make_float2(part.top, part.sum);
    } else {
      __stcg(to, part.x);
      if (is_first) __stcg(top, make_float2(part.top, part.sum));
    }
  }
}

// Whether this CTA leaves the last record of a pair, behind a barrier that all of the record lies
// before. The counter is 0 again after that.
__device__ __forceinline__ bool leaves_last(const DecodeParams& p, const Item& item) {
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

// Parts begin .. n - 1 of a head -> one, in order; rows and tops of consecutive ones lie `size`
// floats apart.
template <int kAhead, class V>
__device__ __forceinline__ Part<V> sum_parts(const float* rows, const float* tops, int begin, int n,
                                             int size) {
  Part<V> total;
  rows += begin * size;
  tops += begin * size;
#pragma unroll 1
  for (; begin < n; begin += kAhead, rows += kAhead * size, tops += kAhead * size) {
    float2 top[kAhead];
    V x[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      top[k] = make_float2(kNothing, 0.0f);
      x[k] = {};
      ptx::load_left(top[k], tops + k * size, begin + k, n);
      ptx::load_left(x[k], rows + k * size, begin + k, n);
    }
    const float before = total.top;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) total.top = fmaxf(total.top, top[k].x);
    const float keep = exp2_fast(before - total.top);
    total.sum *= keep;
    total.x = scaled(keep, total.x);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const float weight = exp2_fast(top[k].x - total.top);
      total.sum = fmaf(weight, top[k].y, total.sum);
      add_scaled(total.x, weight, x[k]);
    }
  }
  return total;
}

// The group's i-th item -> its columns of shared.output, in codec coordinates, of shared.turned,
// where the exact tokens' sums lie, and of merged_tops: of one item its record, else all of the
// pair's. Nothing is divided by the sum of probabilities yet.
template <class S>
__device__ __forceinline__ void join_parts(const DecodeParams& p, const Item& item, int i,
                                           const Slot<S>& slot, const Shared<S>& shared) {
  constexpr int HEADS = S::HEADS, kAhead = S::DIM <= 128 ? 16 : 8;
  const Pair& pair = item.pair;
  const int D = S::head_dim(p), n_packed = pair.n_heads * D / 2, n_parts = item.n_parts;
  const int size = static_cast<int>(record_floats(HEADS, D));
  const bool alone = n_parts == 1;
  const float* const records = record_of<S>(p, item, 0);
  // A task: two dimensions of packed tokens' sums, or four of exact ones'.
#pragma unroll 1
  for (int e = threadIdx.x; e < n_packed + n_packed / 2; e += S::THREADS) {
    const bool exact = e >= n_packed;
    const int task = exact ? 2 * (e - n_packed) : e, h = task / (D / 2), d = 2 * (task % (D / 2));
    const int column = i * pair.n_heads + h, row = h * D + d, top = 2 * HEADS * D + 2 * h;
    float2& merged = shared.merged_tops()[2 * column + exact];
    if (!exact) {
      Part<float2> part;
      if (alone) {
        part.x = *reinterpret_cast<const float2*>(slot.record() + row);
        part.top = slot.tops()[2 * h];
        part.sum = slot.tops()[2 * h + 1];
      } else {
        part = sum_parts<kAhead, float2>(records + row, records + top, 0, n_parts, size);
      }
      const float2 x = scaled(shared.value_scales()[d / S::kValueSub], part.x);
      if (p.values.matrix != nullptr) {
        store_terms(shared.output, column, d, x);
      } else {
        shared.output[place_of<S>(column, d)] = x.x;
        shared.output[place_of<S>(column, d + 1)] = x.y;
      }
      if (d == 0) merged = make_float2(part.top, part.sum);
    } else {
      Part<float4> part;
      if (alone) {
        part.x = *reinterpret_cast<const float4*>(slot.record() + HEADS * D + row);
        part.top = slot.tops()[2 * HEADS + 2 * h];
        part.sum = slot.tops()[2 * HEADS + 2 * h + 1];
      } else if (item.n_exact > 0) {
        part = sum_parts<4, float4>(records + HEADS * D + row, records + top + 2 * HEADS,
                                    item.before_exact, n_parts, size);
      }
      *reinterpret_cast<float4*>(shared.turned + column * S::DIM + d) = part.x;
      if (d == 0) merged = make_float2(part.top, part.sum);
    }
  }
}

// The columns of the group's n items -> out and log-sum-exp, of those whose bit is set. Between
// barriers.
template <class S>
__device__ __forceinline__ void write_outputs(const DecodeParams& p, const Group& group, int n,
                                              unsigned finished, Tile<S>& tile,
                                              const Shared<S>& shared) {
  const Pair& head = group.items[0].pair;
  const int D = S::head_dim(p), n_heads = head.n_heads, n_columns = n * n_heads;
  const bool dense = p.values.matrix != nullptr;
  const float* lambda = nullptr;
  if (dense) {
    tile.template multiply<S::WARPS>(p, p.values, head.kv_head, shared.output, shared);
    __syncthreads();
  } else if (p.values.hadamard) {
    hadamard_heads<S, S::WARPS>(shared.output, D);
    if (p.values.lambda != nullptr) lambda = p.values.lambda + head.kv_head * D;
  }
  for (int e = 2 * threadIdx.x; e < n_columns * D; e += 2 * S::THREADS) {
    const int c = e / D, d = e - c * D;
    const Column column(c, n_heads);
    if ((finished >> column.item & 1) == 0) continue;
    float2 y;
    if (dense) {
      y = *reinterpret_cast<const float2*>(shared.area + c * S::DIM + d);
    } else {
      y = make_float2(shared.output[place_of<S>(c, d)], shared.output[place_of<S>(c, d + 1)]);
      if (lambda != nullptr) {
        y.x *= __ldg(lambda + d);
        y.y *= __ldg(lambda + d + 1);
      }
    }
    // Packed and exact tokens' sums have a reference and a sum of probabilities each.
    const float2 packed = shared.merged_tops()[2 * c], exact = shared.merged_tops()[2 * c + 1];
    const float top = fmaxf(packed.x, exact.x), packed_weight = exp2_fast(packed.x - top),
                exact_weight = exp2_fast(exact.x - top);
    const float total = packed_weight * packed.y + exact_weight * exact.y;
    const float inverse = total > 0.0f ? reciprocal(total) : 0.0f;
    const float2 more = *reinterpret_cast<const float2*>(shared.turned + c * S::DIM + d);
    y.x = (y.x * packed_weight + more.x * exact_weight) * inverse;
    y.y = (y.y * packed_weight + more.y * exact_weight) * inverse;
    const int64_t row = static_cast<int64_t>(group.items[column.item].pair.sequence) * p.n_q_heads +
                        head.first_head + column.head;
    if (d == 0 && p.lse != nullptr)
      p.lse[row] = total > 0.0f ? (top + __log2f(total)) * kLn2 : -INFINITY;
    store_pair(p.out, row * D + d, p.out_type, y);
  }
}

}  // namespace veloxquant::attention::cuda
