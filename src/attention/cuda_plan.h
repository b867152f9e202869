// How decode attention is cut into work, and where its scratch lies. Shared by host and device.
//
// Every (KV head, group of query heads, sequence) is a pair; a pair has one unit for each packed
// block and then one for each 16 exact tokens, and is cut into equal items of at most T units; a
// CTA takes an item at a time. T is chosen by cost: waves of CTAs x (T + what an item costs beside
// its units). Lengths are known on the device alone, so every CTA works the plan out for itself.
// The items of a pair that has several leave records; the CTA that leaves the last of them puts
// them together, in the order of the items.
//
// Scratch: a counter for each of max_items, of which a pair uses its first item's; as many records.
#pragma once

#include <cstdint>

namespace veloxquant::attention::cuda {

constexpr int kMaxBatch = 1024;
constexpr int kMaxHeadDim = 256;

// What decode attention needs of one side, by value in the kernel's parameters.
struct SideView {
  const uint8_t* codes;
  const uint8_t* entries;
  const float* scales;
  const void* matrix;   // dense transform in operand order (cuda_layout.h), or null
  const float* lambda;  // Hadamard with smoothing, or null
  int64_t batch_stride, head_stride;
  int64_t entries_stride;
  int hadamard;
  int n_sequences;
};

struct ExactView {
  const uint16_t* data;
  int64_t batch_stride, head_stride, token_stride;
};

struct DecodeParams {
  SideView keys, values;
  ExactView exact_keys, exact_values;
  const int32_t* n_packed;
  const int32_t* n_exact;
  const void* q;
  void* out;
  float* lse;
  uint8_t* workspace;
  float scale;
  int batch, n_q_heads, n_kv_heads, head_dim, group, n_groups, heads_per_group;
  int q_type, out_type;  // 0 fp32, 1 fp16, 2 bf16
  int n_ctas, n_pairs;
  int most_pieces, even_pieces;  // of a sequence: where a wave has only its items, or all alike
  int64_t records_at;            // offset in the workspace
};

#ifdef __CUDACC__
#define VQ_PLAN __host__ __device__ inline
#else
#define VQ_PLAN inline
#endif

// Query heads of a KV head that a CTA takes together: up to 8, else half of them.
VQ_PLAN int heads_together(int group) { return group <= 8 ? group : (group + 1) / 2; }

// What an item costs beside its units: queries, tables, merge.
constexpr int kItemUnits = 16;
// Items of a call whose pairs are cut, at most: more waves than this are not worth a finer cut.
VQ_PLAN int max_items(int n_ctas) { return 4 * n_ctas; }

VQ_PLAN int divide_up(int a, int b) { return (a + b - 1) / b; }

// The counters of the items that have left their records. Whatever the scratch holds at first: a
// word without the mark counts as 0.
constexpr uint64_t kCounterMark = 0x9e3779b97f4a0000u;
constexpr uint64_t kCounterBits = 0xffffu;

// Floats of a record: packed and exact outputs [2][heads][D], then of each head's the maximum and
// the sum, [2][heads][2].
VQ_PLAN int64_t record_floats(int heads, int head_dim) {
  return static_cast<int64_t>(2 * heads) * head_dim + 4 * heads;
}

// Units of a pair: its packed blocks, then chunks of 16 exact tokens, a warp's turn each.
constexpr int kChunkTokens = 16;
struct Units {
  int blocks, all;
};
VQ_PLAN Units units_of(int n_packed, int n_exact) {
  const int blocks = divide_up(n_packed, 64);
  return {blocks, blocks + divide_up(n_exact, kChunkTokens)};
}
// The first unit of a part; any cut is right that all agree on. per_part: units.all / n_parts.
VQ_PLAN int first_unit(const Units& units, int part, int n_parts, float per_part) {
  return part == n_parts ? units.all : static_cast<int>(static_cast<float>(part) * per_part);
}
// The first part that has exact tokens, of those with any.
VQ_PLAN int first_exact_part(const Units& units, int n_parts, float per_part) {
  int part = n_parts - 1;
  while (part > 0 && first_unit(units, part, n_parts, per_part) > units.blocks) --part;
  return part;
}

}  // namespace veloxquant::attention::cuda
