#include "src/attention/cuda_general_call.h"

#include <algorithm>
#include <climits>

#include "src/attention/cuda_plan.h"

namespace veloxquant::cuda {

using attention::DecodeShape;
using attention::RaggedShape;

namespace {

constexpr int kMaxRows = 65535;  // query rows of a KV head: threadgroups of a launch's dimension
constexpr int kMaxSigns = 1024;  // of a sketch: the longest that the tests have

void check_side(const AttendArgs& args, const BlockSide& side, Side wanted, const char* name) {
  require(!side.codec.empty() && side.codec->side == wanted, "[attend] ", name,
          ": got a codec of the other side or none, wanted one of prepare_codec");
  const attention::DeviceCodec& codec = *side.codec;
  require(codec.no_attention.empty(), "[attend] ", name, ": got ", codec.name, ", but ",
          codec.no_attention, ", wanted a codec with attention kernels");
  require(codec.n_sequences == 1 || codec.n_sequences == args.batch, "[attend] ", name,
          ": got tables for ", codec.n_sequences, " sequences, wanted 1 or batch = ", args.batch);
  check_blocks("attend", name, side, args.table);
}

}  // namespace

RaggedShape checked_call(const AttendArgs& args) {
  require(args.batch >= 1, "[attend] batch: got ", args.batch, ", wanted at least 1");
  require(args.n_packed != nullptr || args.n_exact != nullptr,
          "[attend] n_packed, n_exact: got null for both, wanted tokens to attend to");
  const bool packed = args.n_packed != nullptr, exact = args.n_exact != nullptr;
  // Without packed tokens the codec says the shape alone.
  require(!args.keys.codec.empty(), "[attend] keys: got no codec, wanted one of prepare_codec");
  const attention::DeviceCodec& k = *args.keys.codec;
  RaggedShape ragged;
  DecodeShape& s = ragged.decode;
  if (packed) {
    check_side(args, args.keys, Side::keys, "keys");
    check_side(args, args.values, Side::values, "values");
    const attention::DeviceCodec& v = *args.values.codec;
    require(v.n_kv_heads == k.n_kv_heads && v.head_dim == k.head_dim, "[attend] values: got ",
            v.n_kv_heads, " heads of ", v.head_dim, ", wanted those of the keys: ", k.n_kv_heads,
            " of ", k.head_dim);
    require(args.max_packed >= 1 && args.max_packed <= INT_MAX - 64, "[attend] max_packed: got ",
            args.max_packed, ", wanted the room for packed tokens, at least 1");
    s.keys = k.format;
    s.values = v.format;
    s.key_transform = k.transform;
    s.value_transform = v.transform;
    require(s.key_rows() <= kMaxSigns, "[attend] keys: got a sketch of ", s.key_rows(),
            " signs, wanted at most ", kMaxSigns);
    s.n_spans = 1;
    ragged.most_packed = args.max_packed;
    ragged.paged = args.table.blocks != nullptr;
    require(!ragged.paged || args.table.stride >= (args.max_packed + 63) / 64,
            "[attend] table: got ", args.table.stride, " blocks a sequence, wanted ",
            (args.max_packed + 63) / 64, " for max_packed");
    ragged.table_step = args.table.stride;
    ragged.pool = args.table.pool;
  }
  if (exact) {
    require(args.exact_dtype == DType::float16 || args.exact_dtype == DType::bfloat16,
            "[attend] exact_dtype: got ", dtype_name(args.exact_dtype),
            ", wanted float16 or bfloat16");
    require(args.exact_keys.data != nullptr && args.exact_values.data != nullptr,
            "[attend] exact_keys, exact_values: got null, wanted exact tokens where n_exact is "
            "given");
    require(args.max_exact >= 1 && args.max_exact <= INT_MAX / 2, "[attend] max_exact: got ",
            args.max_exact, ", wanted the room for exact tokens, at least 1");
    s.n_exact = 1;
    ragged.most_exact = args.max_exact;
    ragged.wide_exact = true;
    for (const ExactSide* side : {&args.exact_keys, &args.exact_values}) {
      ragged.wide_exact &= side->batch_stride % 4 == 0 && side->head_stride % 4 == 0 &&
                           side->token_stride % 4 == 0 &&
                           reinterpret_cast<uintptr_t>(side->data) % 8 == 0;
    }
  }
  require(args.n_q_heads >= k.n_kv_heads && args.n_q_heads % k.n_kv_heads == 0 &&
              args.n_q_heads / k.n_kv_heads <= 16,
          "[attend] n_q_heads: got ", args.n_q_heads, ", wanted 1 to 16 times the ", k.n_kv_heads,
          " KV heads");
  const int group = args.n_q_heads / k.n_kv_heads;
  require(args.n_queries >= 1 && args.n_queries <= kMaxRows / group, "[attend] n_queries: got ",
          args.n_queries, ", wanted 1 to ", kMaxRows / group, " with ", group,
          " query heads of a KV head");
  require(int64_t{args.batch} * k.n_kv_heads <= 65535, "[attend] batch: got ", args.batch, " of ",
          k.n_kv_heads, " KV heads, wanted at most 65535 in all");
  require(args.scale > 0.0f, "[attend] scale: got ", args.scale, ", wanted more than 0");
  require(args.sinks >= 0 && args.sliding_window >= 0 && args.logit_softcap >= 0.0f,
          "[attend] sinks, sliding_window, logit_softcap: got ", args.sinks, ", ",
          args.sliding_window, ", ", args.logit_softcap, ", wanted none below 0");
  s.batch = args.batch;
  s.n_kv_heads = k.n_kv_heads;
  s.group = group;
  s.n_queries = args.n_queries;
  s.head_dim = k.head_dim;
  s.bfloat_cache = args.exact_dtype == DType::bfloat16;
  s.softcap = args.logit_softcap > 0.0f;
  s.mask = args.mask != nullptr;
  s.sinks = args.sink_logits != nullptr;
  s.out = float_type("attend", "out_dtype", args.out_dtype);
  float_type("attend", "q_dtype", args.q_dtype);
  ragged.sinks = args.sinks;
  ragged.window = args.sliding_window;
  ragged.causal = args.causal;
  DecodeShape few = s;  // rows are this path's own matter
  few.n_queries = 1;
  if (const auto reason = attention::no_decode_kernel_because(few)) {
    fail("[attend] codecs: got ", *reason, ", wanted a shape that the general kernels take");
  }
  return ragged;
}

Workspace workspace_of(const RaggedShape& shape, const attention::RaggedItems& items) {
  const DecodeShape& s = shape.decode;
  Workspace at;
  const auto place = [&](int64_t floats) {
    const int64_t begin = at.bytes;
    at.bytes += (4 * floats + 255) / 256 * 256;
    return begin;
  };
  const int64_t rows = int64_t{s.batch} * s.n_kv_heads * s.n_rows();
  if (s.n_spans > 0 && s.key_transform == 2) at.turned = place(rows * s.key_rows());
  at.parts = place(rows * items.all() * s.head_dim);
  at.sums = place(rows * items.all() * 2);
  at.lse = place(rows);
  return at;
}

bool fits_shared_memory(Lookup lookup, int64_t table_bytes, int head_dim, int heads,
                        int shared_per_block) {
  // The least that stands beside tables. Results may lie over tables, but those of eight heads of
  // 256 dimensions, 12 x 8 x 256 numbers, are more than tables by lane, and 32 KB stand beside
  // them.
  constexpr int kLaneTables = 64 << 10, kBesideTables = 16 << 10, kLargeResults = 130 << 10;
  if (lookup == Lookup::by_lane) table_bytes = kLaneTables;
  const int64_t results = head_dim > 128 && heads > 4 ? kLargeResults : 0;
  return std::max(table_bytes + kBesideTables, results) <= shared_per_block;
}

const char* not_fast_because(const AttendArgs& args, int shared_per_block) {
  if (args.n_packed == nullptr) return "no packed tokens";
  const auto &k = args.keys.codec->fragments, &v = args.values.codec->fragments;
  if (!k || !v) return "blocks are not in fragment order";
  if (args.n_queries > 1) return "more than one query";
  if (args.sliding_window > 0) return "a sliding window";
  if (args.mask != nullptr) return "a mask";
  if (args.logit_softcap > 0.0f) return "capped logits";
  if (args.sink_logits != nullptr) return "logits of sinks";
  if (args.table.blocks != nullptr) return "paged blocks";
  for (const BlockSide* side : {&args.keys, &args.values}) {
    if (side->block_stride != side->codec->block_bytes) return "blocks apart from each other";
    if (side->sequence_stride % 16 != 0 || side->head_stride % 16 != 0 ||
        reinterpret_cast<uintptr_t>(side->blocks) % 16 != 0) {
      return "blocks off 16 bytes";
    }
  }
  for (const ExactSide* side : {&args.exact_keys, &args.exact_values}) {
    if (args.n_exact == nullptr) continue;
    if (side->batch_stride % 8 != 0 || side->head_stride % 8 != 0 || side->token_stride % 8 != 0 ||
        reinterpret_cast<uintptr_t>(side->data) % 16 != 0) {
      return "exact tokens off 16 bytes";
    }
  }
  if (reinterpret_cast<uintptr_t>(args.q) % (2 * dtype_bytes(args.q_dtype)) != 0 ||
      reinterpret_cast<uintptr_t>(args.out) % (2 * dtype_bytes(args.out_dtype)) != 0) {
    return "queries or outputs off two elements";
  }
  if (k->lookup != v->lookup) return "tables by lane on one side, by sub-vector on the other";
  const int heads = attention::cuda::heads_together(args.n_q_heads / k->n_kv_heads);
  if (!fits_shared_memory(k->lookup, k->entries_stride + v->entries_stride, k->head_dim, heads,
                          shared_per_block)) {
    return "tables, or the results of a KV head's queries, that fit no multiprocessor";
  }
  return nullptr;
}

DecodeArgs fast_args(const AttendArgs& args) {
  DecodeArgs fast;
  fast.batch = args.batch;
  fast.n_q_heads = args.n_q_heads;
  fast.scale = args.scale;
  const auto side = [](const BlockSide& from) {
    return PackedSide{*from.codec->fragments, from.blob, from.blocks, from.sequence_stride,
                      from.head_stride};
  };
  fast.keys = side(args.keys);
  fast.values = side(args.values);
  fast.n_packed = args.n_packed;
  fast.exact_keys = args.exact_keys;
  fast.exact_values = args.exact_values;
  fast.exact_dtype = args.exact_dtype;
  fast.n_exact = args.n_exact;
  fast.q = args.q;
  fast.q_dtype = args.q_dtype;
  fast.out = args.out;
  fast.out_dtype = args.out_dtype;
  fast.lse = args.lse;
  fast.workspace = args.workspace;
  fast.workspace_bytes = args.workspace_bytes;
  return fast;
}

}  // namespace veloxquant::cuda
