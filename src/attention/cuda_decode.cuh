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
  extern __shared__ __align__(1024) char base[];
  const int D = S::head_dim(p), head_groups = p.n_kv_heads * p.n_groups;
  const Shared<S> shared(base, p, D);
  let_next_start();
  // Which head the first item is of is known without the plan.
  const int first_kv_head = kv_head_of(p, first_item(head_groups, blockIdx.x, gridDim.x));
  const bool one_table = p.keys.n_sequences == 1 && p.values.n_sequences == 1;
  TableRows<S> tables = TableRows<S>::fetch(p, first_kv_head, 0);
  // The queries' matrix first; the outputs' takes its place when it is used.
  const auto stage_first = [&](int kv_head) {
    if (p.keys.matrix != nullptr) {
      stage_matrix<S>(p, p.keys, kv_head, 0, shared);
    } else {
      stage_matrix<S>(p, p.values, kv_head, 0, shared);
    }
  };
  stage_first(first_kv_head);
  wait_for_stream();
  Cut cut = {shared.tokens(), shared.exact(), shared.items(), 0};
  cut.make(p);
  const int n_items = cut.per_head * head_groups;
  const int end = first_item(n_items, blockIdx.x + 1, gridDim.x);
  int index = first_item(n_items, blockIdx.x, gridDim.x);
  if (index == end) return;
  Start<S> start;
  Walk<S> walk;
  bool other_tables = true;
  {
    const Item item = cut.item(p, index);
    if (!one_table) tables = TableRows<S>::fetch(p, item.pair.kv_head, item.pair.sequence);
    start = Start<S>::fetch(p, item);
    ExactShare<S>(p, item).prefetch(p);
    walk = Walk<S>::begin(p, item.pair, item.first_step, item.end_step);
    if (threadIdx.x == 0) shared.item() = item;
  }
  __syncthreads();
  // Items side by side: a CTA's are most often of one head, whose tables it loads once.
#pragma unroll 1
  while (true) {
    start.store(p, shared.item(), shared);
    tables.store_scales(shared);
    // Where results lie over the tables, the transform's do so too.
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      const Pair& pair = shared.item().pair;
      if (turn == (p.merge_over_tables != 0)) {
        if (turn == 1) __syncthreads();
        if (other_tables) tables.store(p, pair.kv_head, pair.sequence, shared);
      }
      if (turn == 0) prepare_queries<S>(p, pair, shared);
    }
    __syncthreads();
    attend_steps<S>(p, walk, shared.item().n_tokens, shared);
    const Item done = shared.item();
    const ExactShare<S> share(p, done);
    if (share.first < share.end) {
      if (p.exact_bf16) {
        attend_exact<true, S>(p, done.pair, share, shared);
      } else {
        attend_exact<false, S>(p, done.pair, share, shared);
      }
    }
    // After the last item a walk without steps, so that no registers are kept for it.
    const bool more = ++index < end;
    Item item = done;
    if (more) item = cut.item(p, index);
    Start<S> next_start;
    if (more) {
      next_start = Start<S>::fetch(p, item);
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
      wait_for_matrix();
      __syncthreads();
      finish<S>(p, done.pair, alone ? 1 : S::kGroups, alone ? shared.merged : shared.rows, shared);
    }
    if (!more) break;
    other_tables = p.merge_over_tables || item.pair.kv_head != done.pair.kv_head ||
                   (!one_table && item.pair.sequence != done.pair.sequence);
    if (threadIdx.x == 0) shared.item() = item;
    tables = TableRows<S>::fetch(p, item.pair.kv_head, item.pair.sequence);
    wait_for_matrix();
    __syncthreads();
    stage_first(item.pair.kv_head);
  }
}

}  // namespace veloxquant::attention::cuda
