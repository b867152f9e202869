#include "src/attention/problem.h"

#include <algorithm>
#include <limits>
#include <string>

#include "src/attention/element.h"
#include "src/backends/cpu/convert.h"

namespace veloxquant::attention {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::string shape_text(const int64_t* shape, int ndim) {
  std::string text = "[";
  for (int d = 0; d < ndim; ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
  return text + "]";
}

// Throws unless `view` is [B, H, n, D] of a float type with contiguous rows; -1 accepts any size.
template <class View>
void check_heads(const char* name, const View& view, std::array<int64_t, 4> wanted) {
  require(is_float(view.dtype), "[attend] ", name, " dtype: got ", dtype_name(view.dtype),
          ", wanted float32, float16 or bfloat16");
  bool fits = view.ndim == 4;
  for (int d = 0; fits && d < 4; ++d) fits = wanted[d] < 0 || view.shape[d] == wanted[d];
  require(fits, "[attend] ", name, " shape: got ", shape_text(view.shape.data(), view.ndim),
          ", wanted ", shape_text(wanted.data(), 4), " (-1: any)");
  require(view.size() == 0 || !view.empty(), "[attend] ", name, ": got no data, wanted ",
          shape_text(wanted.data(), 4));
  require(view.shape[3] <= 1 || view.stride[3] == 1, "[attend] ", name,
          " stride of the last axis: got ", view.stride[3], ", wanted 1");
}

void check_codec(const char* name, const CodecPtr& codec, Side side, const Problem& p) {
  require(codec != nullptr, "[attend] ", name, ": got none, wanted one for the packed runs");
  require(codec->side() == side, "[attend] ", name, ": got a codec of the other side");
  require(codec->head_dim() == p.head_dim, "[attend] ", name, " head_dim: got ", codec->head_dim(),
          ", wanted that of q, ", p.head_dim);
  require(codec->n_kv_heads() == p.n_kv_heads, "[attend] ", name, " n_kv_heads: got ",
          codec->n_kv_heads(), ", wanted ", p.n_kv_heads);
  require(codec->n_sequences() == 1 || codec->n_sequences() == p.batch, "[attend] ", name,
          " sequences: got ", codec->n_sequences(), ", wanted 1 or ", p.batch);
}

void check_mask(Problem& p) {
  const AttentionMask& mask = p.params.mask;
  require(mask.sliding_window >= 0, "[attend] mask.sliding_window: got ", mask.sliding_window,
          ", wanted 0 (none) or more");
  if (!p.has_mask_array()) return;
  const TensorView& array = mask.array;
  require(is_float(array.dtype) || array.dtype == DType::boolean, "[attend] mask.array dtype: got ",
          dtype_name(array.dtype), ", wanted boolean, float32, float16 or bfloat16");
  const int64_t wanted[4] = {p.batch, p.n_q_heads, p.n_queries, p.source.length};
  bool fits = array.ndim <= 4;
  for (int d = 0; fits && d < array.ndim; ++d) {
    int axis = 4 - array.ndim + d;
    fits = array.shape[d] == wanted[axis] || array.shape[d] == 1;
    p.mask_stride[axis] = array.shape[d] == 1 ? 0 : array.stride[d];
  }
  require(fits, "[attend] mask.array shape: got ", shape_text(array.shape.data(), array.ndim),
          ", wanted one that broadcasts to ", shape_text(wanted, 4));
}

void check_outputs(const Problem& p) {
  check_heads("out", p.out, {p.batch, p.n_q_heads, p.n_queries, p.head_dim});
  if (!p.lse.empty()) {
    const int64_t wanted[3] = {p.batch, p.n_q_heads, p.n_queries};
    require(p.lse.dtype == DType::float32, "[attend] lse dtype: got ", dtype_name(p.lse.dtype),
            ", wanted float32");
    require(p.lse.ndim == 3 && std::equal(wanted, wanted + 3, p.lse.shape.begin()),
            "[attend] lse shape: got ", shape_text(p.lse.shape.data(), p.lse.ndim), ", wanted ",
            shape_text(wanted, 3));
  }
  const TensorView& sinks = p.params.sink_logits;
  if (!sinks.empty()) {
    require(sinks.dtype == DType::float32 && sinks.ndim == 1 && sinks.shape[0] == p.n_q_heads,
            "[attend] sink_logits: got ", dtype_name(sinks.dtype), " ",
            shape_text(sinks.shape.data(), sinks.ndim), ", wanted float32 [", p.n_q_heads, "]");
  }
}

void check_run_end(const char* name, int64_t start, int64_t end, int64_t length) {
  require(start >= 0 && end <= length, "[attend] ", name, ": got tokens ", start, " to ", end,
          ", wanted them within the length ", length);
}

void add_packed_tiles(Problem& p) {
  const Visibility& seen = p.source.visibility;
  for (size_t r = 0; r < p.source.packed.size(); ++r) {
    const PackedRun& run = p.source.packed[r];
    if (run.n_blocks == 0) continue;
    require(run.keys != nullptr && run.values != nullptr, "[attend] packed run ", r,
            ": got no blocks, wanted ", run.n_blocks);
    require(run.last_count >= 1 && run.last_count <= kBlockTokens, "[attend] packed run ", r,
            " last_count: got ", run.last_count, ", wanted 1 to ", kBlockTokens);
    check_run_end("packed run", run.start, run.end(), p.source.length);
    for (int block = 0; block < run.n_blocks; ++block) {
      Tile tile;
      tile.packed = true;
      tile.run = static_cast<int>(r);
      tile.offset = block;
      tile.count = block + 1 < run.n_blocks ? kBlockTokens : run.last_count;
      tile.position = run.start + int64_t{kBlockTokens} * block;
      tile.both_forms = seen.n_new_blocks > 0 && tile.position >= seen.tail_start;
      p.tiles.push_back(tile);
    }
  }
  p.n_packed_tiles = static_cast<int64_t>(p.tiles.size());
}

// Tiles do not straddle tail_start: below it (the sinks) tokens are exact for every query.
void add_exact_tiles(Problem& p) {
  const Visibility& seen = p.source.visibility;
  for (size_t r = 0; r < p.source.exact.size(); ++r) {
    const ExactRun& run = p.source.exact[r];
    const std::array<int64_t, 4> wanted = {p.batch, p.n_kv_heads, -1, p.head_dim};
    check_heads("exact keys", run.keys, wanted);
    check_heads("exact values", run.values, {wanted[0], wanted[1], run.keys.shape[2], wanted[3]});
    int64_t n = run.keys.shape[2];
    check_run_end("exact run", run.start, run.start + n, p.source.length);
    for (int64_t token = 0; token < n;) {
      Tile tile;
      tile.run = static_cast<int>(r);
      tile.offset = token;
      tile.position = run.start + token;
      int64_t stop = std::min<int64_t>(n, token + kBlockTokens);
      if (tile.position < seen.tail_start) stop = std::min(stop, seen.tail_start - run.start);
      tile.both_forms = seen.n_new_blocks > 0 && tile.position >= seen.tail_start;
      tile.count = static_cast<int>(stop - token);
      p.tiles.push_back(tile);
      token = stop;
    }
  }
}

}  // namespace

Interval Problem::visible(const Tile& tile, int64_t position) const {
  Interval seen{0, source.length};
  const AttentionMask& mask = params.mask;
  if (mask.causal) seen.end = std::min(seen.end, position + 1);
  if (mask.sliding_window > 0)
    seen.begin = std::max<int64_t>(0, position + 1 - mask.sliding_window);
  if (tile.both_forms) {
    int64_t boundary = source.visibility.code_end(position);
    if (tile.packed) {
      seen.end = std::min(seen.end, boundary);
    } else {
      seen.begin = std::max(seen.begin, boundary);
    }
  }
  return seen;
}

void Problem::load_mask(int b, int q_head, int64_t query, int64_t first, int n, float* mask) const {
  const TensorView& array = params.mask.array;
  const int64_t step = mask_stride[3];
  const int64_t offset =
      b * mask_stride[0] + q_head * mask_stride[1] + query * mask_stride[2] + first * step;
  const uint8_t* from = static_cast<const uint8_t*>(array.data) + offset * dtype_bytes(array.dtype);
  if (array.dtype == DType::boolean) {
    for (int i = 0; i < n; ++i) mask[i] = from[i * step] != 0 ? 0.0f : -kInfinity;
  } else if (step == 1) {
    cpu::to_float(array.dtype, from, n, mask);
  } else {
    for (int i = 0; i < n; ++i) mask[i] = load_element(from, array.dtype, i * step);
  }
}

float Problem::sink_logit(int q_head) const {
  const TensorView& sinks = params.sink_logits;
  return sinks.empty() ? -kInfinity : *static_cast<const float*>(sinks.at(q_head));
}

void Problem::load_queries(int b, int kv_head, int64_t first_row, int64_t n, float* rows) const {
  for (int64_t i = 0; i < n; ++i) {
    const void* from = q.at(b, q_head_of(kv_head, first_row + i), query_of(first_row + i));
    cpu::to_float(q.dtype, from, head_dim, rows + i * head_dim);
  }
}

const uint8_t* Problem::key_block(int b, int kv_head, const Tile& tile) const {
  const PackedRun& run = source.packed[tile.run];
  return run.keys + b * run.key_batch_stride + kv_head * run.key_head_stride +
         tile.offset * source.key_codec->block_bytes();
}

const uint8_t* Problem::value_block(int b, int kv_head, const Tile& tile) const {
  const PackedRun& run = source.packed[tile.run];
  return run.values + b * run.value_batch_stride + kv_head * run.value_head_stride +
         tile.offset * source.value_codec->block_bytes();
}

Problem prepare(const TensorView& q, const KeyValueSource& source, const AttentionParams& params,
                const MutableTensorView& out, const MutableTensorView& lse) {
  Problem p{q, source, params, out, lse};
  check_heads("q", q, {-1, -1, -1, -1});
  p.batch = static_cast<int>(q.shape[0]);
  p.n_q_heads = static_cast<int>(q.shape[1]);
  p.n_queries = q.shape[2];
  p.head_dim = static_cast<int>(q.shape[3]);
  require(p.head_dim >= 8 && p.head_dim % 8 == 0, "[attend] head_dim: got ", p.head_dim,
          ", wanted a multiple of 8");

  p.n_kv_heads = source.key_codec       ? source.key_codec->n_kv_heads()
                 : source.exact.empty() ? p.n_q_heads
                                        : static_cast<int>(source.exact[0].keys.shape[1]);
  require(p.n_kv_heads > 0 && p.n_q_heads % p.n_kv_heads == 0, "[attend] q heads: got ",
          p.n_q_heads, ", wanted a multiple of the ", p.n_kv_heads, " key/value heads");
  p.group = p.n_q_heads / p.n_kv_heads;
  if (!source.packed.empty()) {
    check_codec("key_codec", source.key_codec, Side::keys, p);
    check_codec("value_codec", source.value_codec, Side::values, p);
  }
  require(is_float(source.exact_dtype), "[attend] exact_dtype: got ",
          dtype_name(source.exact_dtype), ", wanted float32, float16 or bfloat16");
  require(params.logit_softcap >= 0, "[attend] logit_softcap: got ", params.logit_softcap,
          ", wanted 0 (none) or more");
  p.first_position =
      params.first_query_position >= 0 ? params.first_query_position : source.length - p.n_queries;
  check_mask(p);
  check_outputs(p);
  add_packed_tiles(p);
  add_exact_tiles(p);
  return p;
}

}  // namespace veloxquant::attention
