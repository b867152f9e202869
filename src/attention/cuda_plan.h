// How decode attention is cut into work, and where its scratch lies. Shared by host and device.
//
// Every (KV head, group of query heads, sequence) is a pair; a pair has one unit for each packed
// block, and is cut into equal items of at most T units; a CTA takes an item at a time. (The exact
// tokens of a pair have a CTA of the kernel before.) T is chosen by cost: waves of CTAs x (T + what
// an item costs beside its units). Lengths are known on the device alone, so every CTA works the
// plan out for itself. The items of a pair write partial results; another kernel combines them, in
// the order of the items.
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
  const float* matrix;  // dense transform, or null
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
  int q_type, out_type, exact_bf16;  // 0 fp32, 1 fp16, 2 bf16
  int n_ctas, n_pairs;
  int most_pieces, even_pieces;  // of a sequence: where a wave has only its items, or all alike
  // Offsets in the workspace.
  int64_t query_at, query_scale_at, partial_at, exact_at, plan_at;
  int query_row_bytes;
  int merge_over_tables;  // where shared memory has no room for both
};

#ifdef __CUDACC__
#define VQ_PLAN __host__ __device__ inline
#else
#define VQ_PLAN inline
#endif

// What an item costs beside its units: queries, tables, merge.
constexpr int kItemUnits = 16;
// Items of a call, at most: more waves than this are not worth a finer cut.
VQ_PLAN int max_items(int n_pairs, int n_ctas) {
  return n_pairs > 4 * n_ctas ? n_pairs : 4 * n_ctas;
}

VQ_PLAN int divide_up(int a, int b) { return (a + b - 1) / b; }

// The first of the items of CTA c of n.
VQ_PLAN int divide_into(int items, int c, int n) {
  return static_cast<int>(static_cast<int64_t>(items) * c / n);
}

// CTAs of a head group that prepare queries: about one a multiprocessor in all.
VQ_PLAN int query_tiles(int batch, int head_groups, int n_ctas) {
  const int wanted = n_ctas / head_groups;
  return wanted < 1 ? 1 : wanted < batch ? wanted : batch;
}

// Floats of one partial result: [heads][D] outputs, then maximum and sum of each head.
VQ_PLAN int64_t partial_floats(int heads, int head_dim) {
  return static_cast<int64_t>(heads) * head_dim + 2 * heads;
}

}  // namespace veloxquant::attention::cuda
