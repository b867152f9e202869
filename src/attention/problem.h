// One call of attend(), validated and cut into tiles of at most 64 tokens. Shared by the reference
// and the CPU path; the oracle does not use it, so that it can catch mistakes made here.
#pragma once

#include <cstdint>
#include <vector>

#include "veloxquant/attention.h"

namespace veloxquant::attention {

// Consecutive tokens of one run in one form.
struct Tile {
  bool packed = false;
  bool both_forms = false;  // Visibility decides per query whether this form is the one it sees
  int run = 0;              // index into source.packed or source.exact
  int64_t offset = 0;       // block of the packed run, or token of the exact run
  int count = 0;
  int64_t position = 0;  // of the first token
};

// Positions [begin, end).
struct Interval {
  int64_t begin = 0;
  int64_t end = 0;
};

struct Problem {
  const TensorView& q;
  const KeyValueSource& source;
  const AttentionParams& params;
  const MutableTensorView& out;
  const MutableTensorView& lse;

  int batch = 0;
  int n_q_heads = 0;
  int n_kv_heads = 0;
  int group = 1;  // query heads per KV head
  int head_dim = 0;
  int64_t n_queries = 0;
  int64_t first_position = 0;  // of the first query
  int64_t mask_stride[4] = {0, 0, 0, 0};

  std::vector<Tile> tiles{};  // the packed ones first
  int64_t n_packed_tiles = 0;

  // Query rows of one KV head: row = query * group + head in group, so that the heads of a group
  // share every decoded tile.
  int64_t n_rows() const { return n_queries * group; }
  int64_t query_of(int64_t row) const { return row / group; }
  int q_head_of(int kv_head, int64_t row) const {
    return kv_head * group + static_cast<int>(row % group);
  }
  int64_t position_of(int64_t row) const { return first_position + query_of(row); }

  // Positions of `tile`'s kind that a query at `position` sees, the array mask apart. Both ends
  // never decrease with the position.
  Interval visible(const Tile& tile, int64_t position) const;

  // Additive mask of positions [first, first + n) from the array, 0 or -inf for a boolean one.
  bool has_mask_array() const { return !params.mask.array.empty(); }
  void load_mask(int b, int q_head, int64_t query, int64_t first, int n, float* mask) const;

  float sink_logit(int q_head) const;  // -inf without sinks

  // Reads rows [first_row, first_row + n) of the queries as fp32 [n][head_dim].
  void load_queries(int b, int kv_head, int64_t first_row, int64_t n, float* rows) const;
  const uint8_t* key_block(int b, int kv_head, const Tile& tile) const;
  const uint8_t* value_block(int b, int kv_head, const Tile& tile) const;
};

// Throws Error with one sentence where an argument does not fit.
Problem prepare(const TensorView& q, const KeyValueSource& source, const AttentionParams& params,
                const MutableTensorView& out, const MutableTensorView& lse);

void attend_reference(const Problem& problem);
void attend_cpu(const Problem& problem);

}  // namespace veloxquant::attention
