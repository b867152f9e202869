// Attention over two-stage scalar codes of keys and vector codes of values, one byte a code.
#pragma once

#include <cstdint>
#include <vector>

#include "veloxquant/tensor_view.h"

namespace veloxquant {

// q: fp32 [B, H, S_q, D], already in the coordinates of the codes. H a multiple of H_kv.
//   k^[t][d] = norm[t] (centroids1[k1[t][d]] + centroids2[k2[t][d]])
//   v^[t]    = the rows values[v[t][0]], values[v[t][1]], ... one after the other
//   out      = softmax(scale q K^T + mask) V
// Codes beyond a table read its last entry.
struct RvqAttendProblem {
  int batch = 0, heads = 0, kv_heads = 0, dim = 0, sub_dim = 0, n_subvectors = 0;
  int64_t n_queries = 0, n_tokens = 0;
  const float* q = nullptr;
  const uint8_t* keys1 = nullptr;  // [B, H_kv, S, D]
  const uint8_t* keys2 = nullptr;
  const float* norms = nullptr;               // [B, H_kv, S] or null: 1
  std::vector<float> centroids1, centroids2;  // at most 256
  const uint8_t* values = nullptr;            // [B, H_kv, S, n_subvectors]
  std::vector<float> value_table;             // [C][sub_dim], C at most 256
  float scale = 1.0f;
  bool causal = false;          // the queries are the last S_q positions
  int64_t sliding_window = 0;   // > 0: a query at t sees positions > t - sliding_window
  const float* mask = nullptr;  // added to the scaled scores, or null
  int64_t mask_stride[4] = {};  // of [B, H, S_q, S], 0 where broadcast
};

// out: fp16 [B, H, S_q, n_subvectors * sub_dim]. Rows that see nothing are 0. Deterministic,
// independent of the number of threads.
void rvq_attend(const RvqAttendProblem& problem, uint16_t* out);

}  // namespace veloxquant
