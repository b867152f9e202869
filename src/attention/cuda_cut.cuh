// The plan on the device: units and items of the sequences of one head, and an item found again.
#pragma once

#include "src/attention/cuda_shape.cuh"

namespace veloxquant::attention::cuda {

// Prefix sums in shared memory.
struct Cut {
  int* tokens;  // [batch], packed
  int* exact;   // [batch]
  int* items;   // [batch + 1]
  int per_head;

  // The first warp, then all after a barrier.
  __device__ __forceinline__ void make(const DecodeParams& p) {
    const int lane = threadIdx.x & 31, heads = p.n_kv_heads * p.n_groups;
    if (threadIdx.x < 32) {
      int longest = 0, shortest = 0x7fffffff;
#pragma unroll 1
      for (int b = lane; b < p.batch; b += 32) {
        const int n = p.n_packed[b], n_exact = p.n_exact == nullptr ? 0 : p.n_exact[b];
        tokens[b] = n;
        exact[b] = n_exact;
        longest = max(longest, units_of(n));
        shortest = min(shortest, units_of(n));
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
        for (int b = 0; b < p.batch; ++b) count += pieces_of(units_of(tokens[b]), inverse);
      }
      const int total = count * heads;
      int cost = quotient(total + p.n_ctas - 1, p.n_ctas) * (t + kItemUnits);
      if (total > max_items(p.n_ctas) && total > p.n_pairs) cost = 0x7fffffff;
      const int best = __reduce_min_sync(0xffffffffu, cost);
      const int chosen = __ffs(__ballot_sync(0xffffffffu, cost == best)) - 1;
      const float chosen_inverse = __shfl_sync(0xffffffffu, inverse, chosen);
      int before = 0;
#pragma unroll 1
      for (int start = 0; start < p.batch; start += 32) {
        const int b = start + lane;
        int sum = b < p.batch ? pieces_of(units_of(tokens[b]), chosen_inverse) : 0;
#pragma unroll 1
        for (int step = 1; step < 32; step *= 2) {
          const int other = __shfl_up_sync(0xffffffffu, sum, step);
          if (lane >= step) sum += other;
        }
        if (b < p.batch) items[b + 1] = before + sum;
        before += __shfl_sync(0xffffffffu, sum, 31);
      }
      if (lane == 0) items[0] = 0;
    }
    __syncthreads();
    per_head = items[p.batch];
  }

  __device__ __forceinline__ Item item(const DecodeParams& p, int index) const {
    const int head_group = quotient(index, per_head), at = index - head_group * per_head;
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
    const int units = units_of(i.n_tokens);
    const float per_part = static_cast<float>(units) * reciprocal(static_cast<float>(i.n_parts));
    const auto unit = [&](int part) {  // the first of a part: any cut is right that all agree on
      return part == i.n_parts ? units : static_cast<int>(static_cast<float>(part) * per_part);
    };
    i.first_step = 2 * unit(i.part);
    i.end_step = min(2 * unit(i.part + 1), (i.n_tokens + 31) / 32);
    i.n_exact = exact[b];
    const int chunks = divide_up(i.n_exact, kChunkTokens),
              shares = exact_parts(i.n_exact, i.n_parts);
    i.first_chunk = i.n_chunks = 0;
    if (i.part < shares) {
      i.first_chunk = quotient(chunks * i.part, shares);
      i.n_chunks = quotient(chunks * (i.part + 1), shares) - i.first_chunk;
    }
    return i;
  }

  __device__ __forceinline__ static int units_of(int tokens) { return (tokens + 63) / 64; }
  // ceil(units / T), up to rounding: any cut is right that all agree on.
  __device__ __forceinline__ static int pieces_of(int units, float inverse) {
    return max(1, static_cast<int>(ceilf(static_cast<float>(units) * inverse - 0.01f)));
  }
  // Sequences are cut into at least so many units where they have them: a step for each warp.
  static constexpr int kLeastUnits = 6;
};

}  // namespace veloxquant::attention::cuda
