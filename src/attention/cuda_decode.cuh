// The decode attention kernel: all of a call in one launch. cuda_plan.h says how its work is cut,
// cuda_fragments.cuh what a step is.
//
// An item: transform the queries, attend to the steps of codes, then to the exact tokens, merge the
// warps. Whatever can be on its way meanwhile is: tables and the queries' matrix from the start,
// the codes of the next item and the matrix of the outputs from the end of the steps.
#pragma once

#include "src/attention/cuda_merge.cuh"
#include "src/attention/cuda_steps.cuh"

namespace veloxquant::attention::cuda {

template <class S>
__global__ void __launch_bounds__(S::THREADS, 1)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  constexpr int HEADS = S::HEADS;
  const int D = S::head_dim(p), head_groups = p.n_kv_heads * p.n_groups;
  extern __shared__ __align__(1024) char base[];
  const Shared<S> shared(base, p, D);
  const bool plans = same_in_warp(threadIdx.x >> 5) == S::kQueryWarps;
  let_next_start();
  // The pair of the first item without the plan: its head is this one, its sequence too where all
  // are equally long.
  const bool in_turn = p.batch == 1 && p.n_pairs <= static_cast<int>(gridDim.x);
  Pair pair;
  {
    const int guess =
        in_turn ? blockIdx.x % p.n_pairs : first_item(p.n_pairs, blockIdx.x, gridDim.x);
    const int head_group = quotient(guess, p.batch);
    pair = pair_of(p, head_group, guess - head_group * p.batch);
  }
  // Tables of one sequence may be the work of the kernel ahead.
  const bool one_table = p.keys.n_sequences == 1 && p.values.n_sequences == 1;
  if (!one_table) wait_for_stream();
  TableRows<S> tables = TableRows<S>::fetch(p, pair.kv_head, pair.sequence);
  // The queries' matrix first; the outputs' takes its place when it is used.
  const auto stage_first = [&](int kv_head) {
    if (p.keys.matrix != nullptr) {
      stage_matrix<S>(p, p.keys, kv_head, shared);
    } else {
      stage_matrix<S>(p, p.values, kv_head, shared);
    }
  };
  stage_first(pair.kv_head);
  tables.store_scales(shared);
  bool store_tables = p.merge_over_tables;  // after the transform then, which lies over them
  if (!store_tables) tables.store(p, pair.kv_head, pair.sequence, shared);
  wait_for_stream();
  const Cut cut = {shared.tokens(), shared.exact(), shared.items()};
  Start<S> start = Start<S>::fetch(p, pair);
  Walk<S> walk;
  bool planned = false;
  int index = 0, end = 0, n_tokens = 0;
  // Items side by side: a CTA's are most often of one head, whose tables it loads once.
#pragma unroll 1
  while (true) {
    if (!plans) {
      start.store(p, pair, shared);
      prepare_queries<S>(p, pair, shared);
    } else if (!planned) {
      cut.make(p);
    } else if ((threadIdx.x & 31) == 0) {
      prepare_counter(p, shared.item());
    }
    __syncthreads();
    if (!planned) {
      planned = true;
      const int of_head = cut.per_head(p), n_items = of_head * head_groups;
      index = first_item(n_items, blockIdx.x, gridDim.x);
      end = first_item(n_items, blockIdx.x + 1, gridDim.x);
      if (in_turn) {
        const int part = blockIdx.x / p.n_pairs;
        index = pair.index * of_head + part;
        end = part < of_head ? index + 1 : index;
      }
      if (index == end) return;
      const Item item = cut.item(p, index);
      const bool other = item.pair.index != pair.index;
      if (other) start = Start<S>::fetch(p, item.pair);
      walk = Walk<S>::begin(p, item.pair, item.first_step, item.end_step);
      ExactShare<S>(p, item).prefetch(p);
      n_tokens = item.n_tokens;
      if (threadIdx.x == 0) shared.item() = item;
      if (other) {  // the transform once more
        pair = item.pair;
        if (!one_table) {
          tables = TableRows<S>::fetch(p, pair.kv_head, pair.sequence);
          tables.store_scales(shared);
          store_tables = true;
        }
        __syncthreads();
        continue;
      }
      if (plans && (threadIdx.x & 31) == 0) prepare_counter(p, item);
    }
    if (p.keys.matrix != nullptr) stage_matrix<S>(p, p.values, pair.kv_head, shared);
    if (store_tables) {
      tables.store(p, pair.kv_head, pair.sequence, shared);
      __syncthreads();
    }
    attend_steps<S>(p, walk, n_tokens, shared);
    const Item done = shared.item();
    const ExactShare<S> share(p, done);
    if (share.first < share.end) {
      if (p.exact_bf16) {
        attend_exact<true, S>(p, share, shared);
      } else {
        attend_exact<false, S>(p, share, shared);
      }
    }
    // After the last item a walk without steps, so that no registers are kept for it.
    const bool more = ++index < end;
    Item item = done;
    if (more) item = cut.item(p, index);
    Start<S> next_start;
    if (more) {
      next_start = Start<S>::fetch(p, item.pair);
      ExactShare<S>(p, item).prefetch(p);
    }
    start = next_start;
    walk = Walk<S>::begin(p, item.pair, item.first_step, more ? item.end_step : item.first_step);
    const bool alone = done.n_parts == 1;
    float* const records =
        reinterpret_cast<float*>(p.workspace + p.records_at) + done.index * record_floats(HEADS, D);
    float* const rows = alone ? shared.merged : records + done.part * record_floats(HEADS, D);
    merge_warps<S>(p, min(done.n_chunks, S::kExactWarps), alone, rows,
                   alone ? shared.merged_tops() : rows + 2 * HEADS * D, shared);
    bool finishes = alone;
    if (!alone) finishes = leaves_last<S>(p, done, shared);
    if (finishes) {
      if (!alone) gather_records<S>(p, done, records, shared.rows, shared);
      ptx::wait_for_copies();
      __syncthreads();
      finish<S>(p, done.pair, alone ? 1 : S::kGroups, alone ? shared.merged : shared.rows, shared);
    }
    if (!more) break;
    pair = item.pair;
    n_tokens = item.n_tokens;
    store_tables = p.merge_over_tables || pair.kv_head != done.pair.kv_head ||
                   (!one_table && pair.sequence != done.pair.sequence);
    if (threadIdx.x == 0) shared.item() = item;
    if (store_tables) tables = TableRows<S>::fetch(p, pair.kv_head, pair.sequence);
    ptx::wait_for_copies();
    __syncthreads();
    stage_first(pair.kv_head);
    if (store_tables) tables.store_scales(shared);
  }
}

}  // namespace veloxquant::attention::cuda
