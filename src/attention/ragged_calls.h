// Attention with lengths of each sequence and blocks where the caller keeps them (metal_ragged.h):
// what the kernels are given, and how they are cut. CUDA launches them
// (src/attention/cuda_general.cu), the MSL machine tests them.
#pragma once

#include "src/attention/kernel_calls.h"

namespace veloxquant::attention {

struct RaggedShape {
  DecodeShape decode;  // n_spans: 1 with packed blocks, n_exact: 1 with exact tokens
  bool paged = false;
  bool wide_exact = false;  // exact tokens lie at multiples of 8 bytes

  // Numbers of the launch, no part of the text.
  int64_t most_packed = 0, most_exact = 0;  // tokens that there is room for
  int sinks = 0, window = 0;
  bool causal = false;
  int64_t table_step = 0;
  int pool = 0;

  int shared_bytes = 227 << 10;  // that a threadgroup may have
};

// A threadgroup: simdgroups with `tiles` times 16 query rows, all the same ones or (together) each
// its own. parts: of a query, halves and what they leave: transformed ones have numbers that halves
// round; of many rows those alone whose transform has smooth factors, which may be of any size.
struct RaggedCut {
  int simdgroups = 0, tiles = 0, parts = 1;
  bool together = false;
  int row_tiles() const { return together ? simdgroups * tiles : tiles; }
};
RaggedCut ragged_cut(const RaggedShape& shape);

// Items of a sequence: of packed tokens, and of exact ones, the first with the sinks. A threadgroup
// takes one of each, or (apart) one.
struct RaggedItems {
  int packed = 0, exact = 0, exact_tokens = 0;
  bool apart = false;
  int all() const { return packed + exact; }
};
// As many as `cores` multiprocessors take at once, by what there is room for.
RaggedItems ragged_items(const RaggedShape& shape, int cores);

// The input `ragged`: see RaggedNumbers in metal_ragged.h.
constexpr int kRaggedCount = 11;
std::array<int32_t, kRaggedCount> ragged_numbers(const RaggedShape& shape,
                                                 const RaggedItems& items);

// inputs, in this order: q [B, Hq, Lq, D]; q_codes fp32 [B, Hq, Lq, key_rows] (key_transform 2
// only); ragged; n_packed int32 [B] (with packed blocks), n_exact int32 [B] (with exact tokens);
// params fp32 [2]: scale, softcap; with packed blocks: smooth, k_tables, v_tables as in
// first_pass_call; steps int64 [6]: keys' step from one sequence, head, block to the next, then
// values', in 32-bit words; k0, v0; table int32 [B, table_step] (paged); ek0, ev0 by strides; mask
// fp32 by strides. outputs as those of first_pass_call; parts of items that no query sees are not
// written.
metal::Call ragged_first_pass_call(const RaggedShape& shape, const RaggedItems& items);

// As second_pass_call, a row by one simdgroup or by several; counts are ragged_counts().
metal::Call ragged_second_pass_call(const RaggedShape& shape);
// Items, packed items, query heads of a KV head, query rows of it.
inline std::array<int32_t, 4> ragged_counts(const RaggedShape& shape, const RaggedItems& items) {
  return {items.all(), items.packed, shape.decode.group, shape.decode.n_rows()};
}

}  // namespace veloxquant::attention
