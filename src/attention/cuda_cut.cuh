// The plan on the device: units and items of the sequences of one head, and an item found again.
#pragma once

#include "src/attention/cuda_shape.cuh"

namespace veloxquant::attention::cuda {

// Prefix sums in shared memory.
struct Cut {
  int* tokens;  // [batch], packed
  int* exact;   // [batch]
  int* items;   // [batch + 1]

  __device__ __forceinline__ int per_head(const DecodeParams& p) const { return items[p.batch]; }

  // One warp; a barrier must follow.
  __device__ __forceinline__ void make(const DecodeParams& p) const {
    const int lane = threadIdx.x & 31, heads = p.n_kv_heads * p.n_groups;
    int longest = 0, shortest = 0x7fffffff;
#pragma unroll 1
    for (int b = lane; b < p.batch; b += 32) {
      const int n = p.n_packed[b], n_exact = p.n_exact == nullptr ? 0 : p.n_exact[b];
      tokens[b] = n;
      exact[b] = n_exact;
      const int units = units_of(n, n_exact).all;
      longest = max(longest, units);
      shortest = min(shortest, units);
    }
    longest = __reduce_max_sync(0xffffffffu, longest);
    shortest = __reduce_min_sync(0xffffffffu, shortest);
    __syncwarp();
    // A lane tries one T: the longest sequence in 1 .. all items of a wave.
    const int pieces = lane == 31 ? p.even_pieces : max((lane + 1) * p.most_pieces / 31, 1);
    const int t = max(quotient(longest + pieces - 1, pieces), kLeastUnits);
    const float inverse = reciprocal(static_cast<float>(t));
    int count = p.batch * pieces_of(longest, inverse);
    if (shortest < longest) {
      count = 0;
#pragma unroll 1
      for (int b = 0; b < p.batch; ++b)
        count += pieces_of(units_of(tokens[b], exact[b]).all, inverse);
    }
    const int total = count * heads;
    int cost = quotient(total + p.n_ctas - 1, p.n_ctas) * (t + kItemUnits);
    if (total > max_items(p.n_ctas) && total > p.n_pairs) cost = 0x7fffffff;
    const int best = __reduce_min_sync(0xffffffffu, cost);
    const int chosen = __ffs(__ballot_sync(0xffffffffu, cost == best)) - 1;
    const float chosen_inverse = __shfl_sync(0xffffffffu, inverse, chosen);
    if (shortest == longest) {
      const int pieces = pieces_of(longest, chosen_inverse);
#pragma unroll 1
      for (int b = lane; b <= p.batch; b += 32) items[b] = b * pieces;
      __syncwarp();
      return;
    }
    int before = 0;
#pragma unroll 1
    for (int start = 0; start < p.batch; start += 32) {
      const int b = start + lane;
      int sum = b < p.batch ? pieces_of(units_of(tokens[b], exact[b]).all, chosen_inverse) : 0;
#pragma unroll 1
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
      }
      if (b < p.batch) items[b + 1] = before + sum;
      before += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (lane == 0) items[0] = 0;
    __syncwarp();
  }

  __device__ __forceinline__ Item item(const DecodeParams& p, int index) const {
    const int of_head = per_head(p);
    const int head_group = quotient(index, of_head), at = index - head_group * of_head;
    int b = 0;
#pragma unroll 1
    for (int high = p.batch; high - b > 1;) {
      const int middle = (b + high) / 2;
      if (items[middle] <= at) {
        b = middle;
      } else {
        high = middle;
      }
    }
    Item i;
    i.pair = pair_of(p, head_group, b);
    i.part = at - items[b];
    i.n_parts = items[b + 1] - items[b];
    i.index = index - i.part;
    i.n_tokens = tokens[b];
    i.n_exact = exact[b];
    const Units units = units_of(i.n_tokens, i.n_exact);
    const float per_part = units_a_part(units, i.n_parts);
    const int first = first_unit(units, i.part, i.n_parts, per_part);
    const int end = first_unit(units, i.part + 1, i.n_parts, per_part);
    const int n_steps = (i.n_tokens + 31) / 32;
    i.first_step = min(2 * first, n_steps);
    i.end_step = min(2 * end, n_steps);
    i.first_chunk = max(first - units.blocks, 0);
    i.n_chunks = max(end - units.blocks, 0) - i.first_chunk;
    return i;
  }
  // Parts of a pair before the first with exact tokens, of those with any.
  __device__ __forceinline__ static int parts_before_exact(const Item& item) {
    const Units units = units_of(item.n_tokens, item.n_exact);
    return first_exact_part(units, item.n_parts, units_a_part(units, item.n_parts));
  }
  __device__ __forceinline__ static float units_a_part(const Units& units, int n_parts) {
    return static_cast<float>(units.all) * reciprocal(static_cast<float>(n_parts));
  }

  // ceil(units / T), up to rounding: any cut is right that all agree on.
  __device__ __forceinline__ static int pieces_of(int units, float inverse) {
    return max(1, static_cast<int>(ceilf(static_cast<float>(units) * inverse - 0.01f)));
  }
  // Sequences are cut into at least so many units where they have them: a step for each warp.
  static constexpr int kLeastUnits = 6;
};

}  // namespace veloxquant::attention::cuda
