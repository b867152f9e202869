// The decode attention kernel: all of a call in one launch. cuda_plan.h says how its work is cut,
// cuda_fragments.cuh what a step is.
//
// A group of items: transform their queries; of each, attend to the steps of codes, then to the
// exact tokens, merge the warps' results; transform the outputs. Whatever can be on its way
// meanwhile is: tables and the queries' matrix from the start, the matrix of the outputs during the
// steps, the codes of the next item from the end of one's steps.
#pragma once

#include "src/attention/cuda_merge.cuh"
#include "src/attention/cuda_steps.cuh"

namespace veloxquant::attention::cuda {

// The most items of a group.
template <class S>
__device__ __forceinline__ int most_items(const DecodeParams& p, bool one_table) {
  return one_table ? min(Shared<S>::kSlotCount, quotient(S::kColumns, p.heads_per_group)) : 1;
}

// One warp: the group of the CTA's items from `first` on.
__device__ __forceinline__ void make_group(const DecodeParams& p, const Cut& cut, int first,
                                           int end, int most, Group& group) {
  const int lane = threadIdx.x & 31, of_head = cut.per_head(p);
  const int left_of_head = of_head - (first - quotient(first, of_head) * of_head);
  const int n = min(most, min(end - first, left_of_head));
  if (lane < n) group.items[lane] = cut.item(p, first + lane);
  if (lane == 0) {
    group.first = first;
    group.n = max(n, 0);
    group.end = end;
  }
}

template <class S>
__global__ void __launch_bounds__(S::THREADS, 1)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  constexpr bool kOver = Shared<S>::kOver, kTwo = Shared<S>::kBuffers == 2;
  // What shared memory knows is read again in the loops rather than kept in registers. Measured:
  // the compiler's schedule of the loop over steps is better with int8 entries, worse with fp16
  // ones.
  constexpr bool kReadAgain = S::kKey == kInt8;
  extern __shared__ __align__(1024) char base[];
  const Shared<S> shared(base);
  const bool plans = same_in_warp(threadIdx.x >> 5) == S::kQueryWarps;
  let_next_start();
  const bool one_table = p.keys.n_sequences == 1 && p.values.n_sequences == 1;
  const int most = most_items<S>(p, one_table);
  // The one item of a group may use the other place of results.
  const auto more_exact = [&](int n_items) {
    return kTwo && S::kMostExactWarps > S::kExactWarps && n_items == 1 ? 1 : 0;
  };
  // The first group without the plan: its head is this one, its sequences are these where all are
  // equally long and none is cut. Of one sequence the heads come in turn, so that CTAs without an
  // item are the last ones, for which there may be room only when the others are under way.
  const bool in_turn = p.batch == 1 && p.n_pairs <= static_cast<int>(gridDim.x);
  Pair pair;
  int n = 1;
  {
    const int guess =
        in_turn ? blockIdx.x % p.n_pairs : first_item(p.n_pairs, blockIdx.x, gridDim.x);
    const int head_group = quotient(guess, p.batch), sequence = guess - head_group * p.batch;
    pair = pair_of(p, head_group, sequence);
    if (!in_turn) {
      const int end = first_item(p.n_pairs, blockIdx.x + 1, gridDim.x);
      n = max(1, min(min(most, end - guess), p.batch - sequence));
    }
  }
  Staging<S> staging;
  if (plans) staging.begin(shared);
  Walk<S> walk;
  Turns<S> turns;
  bool planned = false, other_tables = true;
  int turn = 0;
#pragma unroll 1
  while (true) {
    // The queries' matrix first; the outputs' takes its place.
    staging.send(p, p.keys.matrix != nullptr ? p.keys : p.values, pair.kv_head, shared);
    // Queries; meanwhile the plan: the items of this group and of the next one.
    bool again;
#pragma unroll 1
    do {
      if (!one_table) wait_for_stream();  // they may be the work of the kernel ahead
      // Where results and a transform lie over the tables, they come only after it.
      if (other_tables) {
        TableRows<S>::place_scales(p, pair, shared);
        if (!kOver) TableRows<S>::place(p, pair, shared);
      }
      wait_for_stream();
      const Start<S> start = Start<S>::fetch(p, pair, n, [&](int i) {
        return planned ? shared.group(turn).items[i].pair.sequence : pair.sequence + i;
      });
      __syncthreads();
      if (!plans) {
        start.store(p, pair, n, shared);
        prepare_queries<S>(p, pair, n, staging, shared);
      } else {
        const Cut cut = {shared.tokens(), shared.exact(), shared.items()};
        if (!planned) {
          cut.make(p);
          const int of_head = cut.per_head(p);
          int first, end;
          if (in_turn) {
            const int part = blockIdx.x / p.n_pairs;
            first = pair.index * of_head + part;
            end = part < of_head ? first + 1 : first;
          } else {
            const int n_items = of_head * p.n_kv_heads * p.n_groups;
            first = first_item(n_items, blockIdx.x, gridDim.x);
            end = first_item(n_items, blockIdx.x + 1, gridDim.x);
          }
          make_group(p, cut, first, end, most, shared.group(0));
          __syncwarp();
        }
        const Group& group = shared.group(turn);
        make_group(p, cut, group.first + group.n, group.end, most, shared.group(turn ^ 1));
      }
      __syncthreads();
      again = false;
      if (!planned) {
        planned = true;
        const Group& group = shared.group(0);
        const int items = same_in_warp(group.n);
        if (items == 0) {
          staging.wait(shared);  // nothing may arrive after the CTA's end
          return;
        }
        const Item& item = group.items[0];
        const Deal<S> deal(item, more_exact(items));
        walk = Walk<S>::begin(p, item, deal);
        ExactShare<S>(p, item, deal).prefetch(p);
        bool other = items > n;
        for (int i = 0; i < items; ++i) other |= group.items[i].pair.index != pair.index + i;
        n = items;
        // Other sequences than thought: their transforms once more.
        again = same_in_warp(other);
        other_tables = !one_table;
        if (again) pair = item.pair;
      }
    } while (again);
    const Group& group = shared.group(turn);
    const Pair& head = kReadAgain ? group.items[0].pair : pair;
    if (plans) prepare_counters(p, group);
    if (p.keys.matrix != nullptr) staging.send(p, p.values, head.kv_head, shared);
    if (kOver) {
      TableRows<S>::place(p, head, shared);
      __syncthreads();
    }
    // Steps of codes and exact tokens. No warp waits for the others at the end of an item but the
    // last one: what they have found of it is merged an item later.
#pragma unroll 1
    for (int i = 0;; ++i) {
      const int n_items = kReadAgain ? same_in_warp(group.n) : n,
                more_exact_now = more_exact(n_items);
      if (i == n_items + kTwo) break;
      if (i < n_items) {
        const Item& item = group.items[i];
        const Deal<S> deal(item, more_exact_now);
        const Results<S> results = shared.results(kTwo ? i & 1 : 0);
        attend_steps<S>(p, walk, item.n_tokens, deal.result(threadIdx.x >> 5), i == 0,
                        shared.slot(i), turns, results, shared);
        const ExactShare<S> share(p, item, deal);
        if (share.first < share.end) attend_exact<S::kBf16, S>(p, share, shared.slot(i), results);
        const Group& next = shared.group(turn ^ 1);
        const bool in_group = i + 1 < n_items, more = in_group || next.n > 0;
        Item after = in_group ? group.items[i + 1] : more ? next.items[0] : item;
        // After the last item a walk without steps, so that no registers are kept for it.
        if (!more) after.end_step = after.first_step, after.n_chunks = 0;
        const Deal<S> next_deal(after, in_group ? more_exact_now : more_exact(next.n));
        ExactShare<S>(p, after, next_deal).prefetch(p);
        walk = Walk<S>::begin(p, after, next_deal);
      }
      const int merged = kTwo ? i - 1 : i;
      if (!kTwo || i == n_items) __syncthreads();
      if (merged >= 0) {
        merge_warps<S>(p, group.items[merged], more_exact_now, shared.slot(merged),
                       shared.results(kTwo ? merged & 1 : 0));
      }
      if constexpr (kTwo) {
        ptx::arrive_warp(shared.done(), i + 1 < n_items);
        turns.count += i + 1 < n_items;
      }
    }
    __syncthreads();
    // Outputs.
    unsigned finished = 0;
#pragma unroll 1
    for (int i = 0; i < (kReadAgain ? group.n : n); ++i) {
      const Item& done = group.items[i];
      const bool alone = done.n_parts == 1;
      if (!alone) {
        if (!leaves_last<S>(p, done, shared)) continue;
        gather_records<S>(p, done, record_of<S>(p, done, 0), shared.area, shared);
        __syncthreads();
      }
      const Slot<S> slot = shared.slot(i);
      join_sums<S>(p, done.pair, i, alone ? 1 : S::kGroups, alone ? slot.record() : shared.area,
                   alone ? slot.tops() : shared.merged_tops(), shared);
      finished |= 1u << i;
    }
    staging.wait(shared);
    __syncthreads();
    if (finished != 0) write_outputs<S>(p, group, kReadAgain ? group.n : n, finished, shared);
    const Group& next = shared.group(turn ^ 1);
    n = same_in_warp(next.n);
    if (n == 0) return;
    const Pair after = next.items[0].pair;
    other_tables = same_in_warp(after.kv_head != head.kv_head ||
                                (!one_table && after.sequence != head.sequence));
    pair = after;
    turn ^= 1;
    __syncthreads();
  }
}

}  // namespace veloxquant::attention::cuda
