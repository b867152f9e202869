// The GPU kernel of rvq_attend's first pass (metal_rvq.h); its second is that of decode attention.
#pragma once

#include <optional>
#include <string>

#include "src/attention/kernel_calls.h"

namespace veloxquant::attention {

// RvqAttendProblem of veloxquant/rvq_attend.h.
struct RvqShape {
  int batch = 1, n_kv_heads = 1, group = 1, n_queries = 1, dim = 0, n_tokens = 0;
  int n_centroids1 = 1, n_centroids2 = 1;
  int n_subvectors = 0, sub_dim = 0, n_values = 1;
  bool norms = false, mask = false;

  // Of the second pass, and of the plan.
  DecodeShape decode() const;
};
std::optional<std::string> no_rvq_kernel_because(const RvqShape& shape);
std::string rvq_limits();  // in words

// inputs: q fp32 [B, Hq, Lq, D]; keys1, keys2 u8 [B, H, S, D]; values u8 [B, H, S, M]; centroids1,
// centroids2, value_table fp32; norms fp32 [B, H, S] or one number; plan, seen, params and outputs
// as first_pass_call's, mask likewise.
metal::Call rvq_pass_call(const RvqShape& shape, int n_items);

}  // namespace veloxquant::attention
