// The GPU kernels of decode attention on packed blocks (metal_decode.h): what they are given, and
// the cut into work. What they compute is attend() of veloxquant/attention.h.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "src/backends/metal/kernel.h"
#include "veloxquant/attention.h"

namespace veloxquant::attention {

// How a side's blocks are read: a tile of src/codecs/<name>/metal_tile.h.
enum class TileKind : uint8_t {
  vecinfer,  // look-ups of sub-vectors
  scalar,    // turboquant and rvq: streams of codes
  planes,    // rabitq and qjl: bit planes
  halves,    // exact: 16 bits
  sketched,  // turboquant's `prod` form
  outliers,  // keys of qjl with outlier channels
  pairs,     // vecinfer_rope: keys turned to their positions
  commvq     // likewise
};

// One side's packed format.
struct CodeFormat {
  int sub_dim = 0, n_centroids = 0, bits = 0;  // bits: of a code, of a stage, of a dimension
  int tables = 1;                              // 1: shared by the sub-vectors of a head
  TileKind kind = TileKind::vecinfer;
  int stages = 1;         // scalar
  bool by_token = false;  // scalar: streams of tokens (values), not of dimensions (keys)
  bool mean = false;      // planes: the table is a mean, [heads, D]
  int n_rows = 0;         // of keys, what a query comes as: signs of a sketch ...; 0: head_dim
  int chunks = 0;         // vecinfer in fragment order: chunks of 8 sub-vectors; 0: portable blocks
  bool bfloat = false;    // halves
  int m_out = 0, outliers = 0;  // outliers: signs of their sketch, channels
  bool fixed = false;           // outliers: the head's, not each block's

  bool turned() const { return kind == TileKind::pairs || kind == TileKind::commvq; }
};

struct DecodeShape {
  int batch = 1, n_kv_heads = 1, group = 1, n_queries = 1, head_dim = 0;
  CodeFormat keys, values;  // unused without spans
  // 0 none, 1 Hadamard with smooth factors, 2 matrices (the queries come transformed as well), 3
  // the seeded rotation of turboquant, rvq, rabitq, 4 (values) matrices transposed.
  int key_transform = 1, value_transform = 1;
  int n_spans = 0, n_exact = 0;  // arrays of packed blocks, of exact tokens
  bool bfloat_cache = false, softcap = false, mask = false;
  bool sinks = true;  // the second pass has logits of sinks
  metal::Type out = metal::Type::float32;

  int n_rows() const { return group * n_queries; }
  int key_rows() const { return keys.n_rows > 0 ? keys.n_rows : head_dim; }
  // Numbers that a row's sums of packed values are; those of exact ones are head_dim.
  int value_rows() const {
    return n_spans > 0 && values.kind == TileKind::sketched ? 2 * head_dim : head_dim;
  }
};

constexpr int kMaxDecodeQueries = 256;  // of a launch: what it writes between its passes grows so

constexpr int kMaxDecodeDim = 256, kMaxDecodeSubDim = 16, kMaxKeyRows = 1280;

// Why there is no kernel for the shape; nothing where there is.
std::optional<std::string> no_decode_kernel_because(const DecodeShape& shape);
std::string decode_limits();  // of codecs and head_dims, in words

// A piece of work of a threadgroup: see kItem* in metal_decode.h.
struct Item {
  bool packed = true;
  int source = 0, first = 0, count = 0, position = 0, capacity = 0;
};
// Tokens [first, first + count) of array `source`, at `position`; capacity: of a span, in blocks.
using Stretch = Item;

// What queries see, four numbers each (metal_decode.h).
std::vector<int32_t> seen_numbers(const Visibility& visibility, const AttentionMask& mask,
                                  int64_t first_query, int64_t n_queries, int64_t length);
// The stretch less tokens that no query sees; of packed ones whole blocks at its start.
Stretch seen_part(const Stretch& stretch, const std::vector<int32_t>& seen);

// GPU cores to plan for, at most what Macs with such a GPU have, by the last letter of its
// architecture's name as Metal gives it ("applegpu_g13s"): p phones and tablets, g an M and its
// Pro, s and c a Max, d an Ultra. 20 where it says nothing.
int metal_cores(const std::string& architecture);

// Stretches cut so that `cores` GPU cores get at least 8 threadgroups each, where the context has
// as many blocks; packed ones first. least_blocks: of an item; a block keeps one of the four
// simdgroups of a threadgroup busy.
std::vector<Item> plan_items(const DecodeShape& shape, const std::vector<Stretch>& stretches,
                             int cores, int least_blocks = 1);

// inputs: q [B, Hq, Lq, D]; matrix fp32 [1 or H, D, key_rows]. outputs: q_codes of the first pass.
metal::Call turn_queries_call(const DecodeShape& shape, int matrices);

// inputs: q [B, Hq, Lq, D]; q_codes fp32 [B, Hq, Lq, key_rows] (key_transform 2 only); plan int32
// [n, 6] (at least 2 rows), seen int32 [Lq, 4], params fp32 [2]: scale, softcap; smooth fp32 [H, D]
// (ones where a codec has none; key_transform 3: the rotation's signs [2, D]; pairs and commvq:
// rope::turn_numbers); k_tables, v_tables: vecinfer and pairs fp16 [S, H, M or 1, C, d], scalar and
// sketched fp32 [stages, 16] levels by code, planes fp32 [1 + H D]: what the stored scalars are
// multiplied with, the means (one number without), outliers qjl::outlier_numbers, commvq its
// codebook, halves any array; k0, v0,
// k1, ...: u8 spans [B, H, capacity, block bytes]; ek0, ev0, ...: exact arrays [B, H, n, D], last
// stride 1; mask (float, broadcast to [B, Hq, Lq, length] by strides). q, plan, spans and tables
// row-major. outputs: parts fp32 [B, H, items, rows, value_rows], sums fp32 [B, H, items, rows, 2].
metal::Call first_pass_call(const DecodeShape& shape, int n_items);
// inputs: parts, sums, counts int32 [3]: items, packed items, query heads of a KV head; sinks fp32
// [Hq] (-inf: none; without `sinks` any array); inverse: smooth [H, D], matrices [H, D, D],
// signs [2, D] (values of `prod`: then its S [D, D]), or one number. outputs: out [B, Hq, Lq, D],
// lse fp32 [B, Hq, Lq].
metal::Call second_pass_call(const DecodeShape& shape);

}  // namespace veloxquant::attention
