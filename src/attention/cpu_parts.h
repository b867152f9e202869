// The pieces that a work item of the CPU path is made of; cpu.cpp cuts and merges them.
#pragma once

#include <cstdint>
#include <string>

#include "src/attention/problem.h"

namespace veloxquant::attention {

// Query rows [first, first + n) of one KV head.
struct Rows {
  int b;
  int kv_head;
  int64_t first;
  int n;
};

struct Segment {
  int64_t begin, end;  // tiles
  bool packed;
};

// Softmax over one segment: out is the sum of exp2(score - max) * value, not yet divided.
struct Partial {
  float* max;
  float* sum;
  float* out;  // [n rows][padded head_dim]
};

// Columns [begin, end) that each row sees of a tile. Returns the rows [first, last) that see any:
// both ends of what a row sees move on with its position, so that these rows are neighbours.
Interval find_visible_rows(const Problem& p, const Rows& rows, const Tile& tile, int* begin,
                           int* end);
// Additive mask of a tile, [n rows][64].
void load_mask(const Problem& p, const Rows& rows, const Tile& tile, float* mask);

// Which sides of the packed blocks are used without decoding them, and how that is called.
struct CodeUse {
  bool keys = false;
  bool values = false;
  std::string name;  // e.g. "register look-ups", or why there is none
};
CodeUse choose_code_use(Backend backend, const KeyValueSource& source, int64_t n_rows,
                        int64_t n_packed_tiles);

// A packed segment in one pass over the keys and one over the values. `scores` is the key codec's
// (made from the queries of this KV head) or null: tiles are decoded instead; the same goes for
// values where `use.values` is false.
void attend_codes(const Problem& p, const Rows& rows, const Segment& segment, const CodeUse& use,
                  const CodeScores* scores, Partial state);

}  // namespace veloxquant::attention
