// The decode attention kernel: all of a call in one launch. cuda_plan.h says how its work is cut,
// cuda_fragments.cuh what a step is.
//
// A group of items: transform their queries; of each, attend to the steps of codes, then to the
// exact tokens, merge the warps' results; transform the outputs. Whatever can be on its way
// meanwhile is: tables and the queries' matrix from the start, the matrix of the outputs during the
// steps, the codes of the next item from the end of one's steps.
#pragma once

#include "src/attention/cuda_merge.cuh"
#include "src/attention/cuda_query.cuh"
#include "src/attention/cuda_steps.cuh"
#include "src/attention/cuda_table_rows.cuh"

namespace veloxquant::attention::cuda {

// The most items of a group.
template <class S>
__device__ __forceinline__ int most_items(const DecodeParams& p, bool one_table) {
  return one_table ? min(Shared<S>::kSlotCount, quotient(S::kColumns, p.heads_per_group)) : 1;
}

// One warp: the group of the CTA's items from `first` on.
__device__ __forceinline__ void make_group(const DecodeParams& p, const Cut& cut, int first,
                                           int end, int most, int number, int ends, Group& group) {
  const int lane = threadIdx.x & 31;
  int n = 0;
  if (first < end) {
    const int of_head = cut.per_head(p);
    const int left_of_head = of_head - (first - quotient(first, of_head) * of_head);
    n = min(most, min(end - first, left_of_head));
    if (lane < n) group.items[lane] = cut.item(p, first + lane);
  }
  if (lane == 0) {
    group.first = first;
    group.n = n;
    group.end = end;
    group.number = number;
    group.ends = ends;
  }
}

// One warp: whether the first n pairs from `pair` on are the group's.
__device__ __forceinline__ bool is_guess(const Group& group, const Pair& pair, int n) {
  const int at = min(static_cast<int>(threadIdx.x & 31), group.n - 1);
  const bool other = group.n > n || (group.n > 0 && group.items[at].pair.index != pair.index + at);
  return !__any_sync(0xffffffffu, other);
}

// One warp, before the group's records are joined: where those with exact tokens begin.
__device__ __forceinline__ void find_exact(Group& group, int n_items) {
  const int lane = threadIdx.x & 31;
  if (lane < n_items) group.items[lane].before_exact = Cut::parts_before_exact(group.items[lane]);
}

// Between barriers: the next group becomes the present one.
template <class S>
__device__ __forceinline__ void next_is_present(const Shared<S>& shared) {
  constexpr int kQuads = sizeof(Group) / 16;
  static_assert(kQuads <= S::THREADS);
  const int e = threadIdx.x;
  if (e < kQuads) {
    reinterpret_cast<uint4*>(&shared.group())[e] =
        reinterpret_cast<const uint4*>(&shared.next_group())[e];
  }
}

template <class S>
__global__ void __maxnreg__(S::kRegisters) decode_kernel(const __grid_constant__ DecodeParams p) {
  constexpr bool kOver = Shared<S>::kOver, kTwo = Shared<S>::kBuffers == 2;
  extern __shared__ __align__(1024) char base[];
  const Shared<S> shared(base);
  const bool plans = same_in_warp(threadIdx.x >> 5) == S::kPlanWarp;
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
  if (plans) Staging<S>::begin(shared);
  Walk<S> walk;
  n = -n;  // as long as it is not planned but thought
  bool other_tables = true;
#pragma unroll 1
  while (true) {
    // Queries; meanwhile the plan: the items of this group and of the next one.
    bool again;
#pragma unroll 1
    do {
      Tile<S> tile;
      tile.fetch(p, p.keys, pair.kv_head);
      if (!one_table) wait_for_stream();  // they may be the work of the kernel ahead
      // Where results and a transform lie over the tables, they come only after it.
      if (other_tables) {
        TableRows<S>::place_scales(p, pair, shared);
        if (!kOver) TableRows<S>::place(p, pair, shared);
      }
      wait_for_stream();
      const bool planned = same_in_warp(n) > 0;
      if (plans) {
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
          Group& made = shared.group();
          make_group(p, cut, first, end, most, 0, 0, made);
          __syncwarp();
          if (made.n > 0) prefetch_codes<S>(p, made.items[0]);
          made.guessed = is_guess(made, pair, -n);
        }
        const Group& group = shared.group();
        make_group(p, cut, group.first + group.n, group.end, most, group.number + 1,
                   group.ends + group.n - 1, shared.next_group());
      }
      if (S::kQueryWarps == S::WARPS || !plans) {
        const int items = abs(n);
        const Start<S> start = Start<S>::fetch(p, pair, items, [&](int i) {
          return planned ? shared.group().items[i].pair.sequence : pair.sequence + i;
        });
        start.store(p, pair, items, shared);
        prepare_queries<S>(p, pair, items, tile, shared);
      }
      __syncthreads();
      again = false;
      if (!planned) {
        const Group& group = shared.group();
        const int items = same_in_warp(group.n);
        if (items == 0) return;
        const Item& item = group.items[0];
        const Deal<S> deal(item, more_exact(items));
        walk = Walk<S>::begin(p, item, deal);
        ExactShare<S>(p, item, deal).prefetch(p);
        n = items;
        // Other sequences than thought: their transforms once more.
        again = same_in_warp(group.guessed) == 0;
        other_tables = !one_table;
        if (again) pair = item.pair;
      }
    } while (again);
    Group& group = shared.group();
    const Pair& head = group.items[0].pair;
    if (plans) prepare_counters(p, group);
    Staging<S>::send(p, head.kv_head, shared);
    if (kOver) {
      TableRows<S>::place(p, head, shared);
      __syncthreads();
    }
    // Steps of codes and exact tokens. No warp waits for the others at the end of an item but the
    // last one: what they have found of it is merged an item later.
#pragma unroll 1
    for (int i = 0;; ++i) {
      const int n_items = same_in_warp(group.n), more_exact_now = more_exact(n_items);
      if (i == n_items + kTwo) break;
      if (i < n_items) {
        const Item& item = group.items[i];
        // Asked again where they are wanted, so that no registers are kept for them in the loop.
        const auto results = [&] { return shared.results(kTwo ? i & 1 : 0); };
        const auto deal = [&] { return Deal<S>(item, more_exact(group.n)); };
        const bool whole = i == 0 && same_in_warp(deal().n_results() == S::WARPS);
        const auto place = [&] {
          wait_for_place<S>(group.ends + i, shared);
          return Result<S>{results(), deal().result(threadIdx.x >> 5)};
        };
        attend_steps<S>(p, walk, item.n_tokens, whole, shared.slot(i), place, shared);
        const ExactShare<S> share(p, item, deal());
        if (share.first < share.end) attend_exact<S::kBf16, S>(p, share, shared.slot(i), results());
        const Group& next = shared.next_group();
        const bool in_group = i + 1 < n_items, more = in_group || next.n > 0;
        if (more) {
          const Item& after = in_group ? group.items[i + 1] : next.items[0];
          const Deal<S> next_deal(after, more_exact(in_group ? n_items : next.n));
          ExactShare<S>(p, after, next_deal).prefetch(p);
          walk = Walk<S>::begin(p, after, next_deal);
        } else {
          walk = Walk<S>::none();  // so that no registers are kept for it
        }
      }
      const int merged = kTwo ? i - 1 : i;
      if (plans && i + 1 == n_items) find_exact(group, n_items);  // it has the fewest steps
      if (!kTwo || i == n_items) __syncthreads();
      if (merged >= 0) {
        merge_warps<S>(p, group.items[merged], more_exact_now, shared.slot(merged),
                       shared.results(kTwo ? merged & 1 : 0));
      }
      if constexpr (kTwo) {
        ptx::arrive_warp(shared.done(), i + 1 < n_items);
      }
    }
    __syncthreads();
    // Outputs.
    unsigned finished = 0;
#pragma unroll 1
    for (int i = 0; i < group.n; ++i) {
      const Item& done = group.items[i];
      if (done.n_parts > 1 && !leaves_last(p, done)) continue;
      join_parts<S>(p, done, i, shared.slot(i), shared);
      finished |= 1u << i;
    }
    Staging<S>::wait(p, group.number, shared);
    if (finished != 0) {
      Tile<S> tile;
      tile.fetch_staged(p, head.kv_head, shared);
      __syncthreads();
      write_outputs<S>(p, group, group.n, finished, tile, shared);
    }
    const Group& next = shared.next_group();
    n = same_in_warp(next.n);
    if (n == 0) return;
    const Pair after = next.items[0].pair;
    other_tables = same_in_warp(after.kv_head != head.kv_head ||
                                (!one_table && after.sequence != head.sequence));
    pair = after;
    __syncthreads();
    next_is_present(shared);
    __syncthreads();
  }
}

}  // namespace veloxquant::attention::cuda
