// Decode attention with lengths of each sequence, as a caller of the GPU kernels holds it: CPU-made
// blocks in strided storage or in a pool, exact tokens, masks; and the fp64 oracle of it. For the
// MSL machine (src/attention/ragged_metal_test.cpp) and for GPUs (tools/gpu/general_check.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "src/codecs/vecinfer/cuda_layout.h"
#include "src/math/float16.h"
#include "tests/support/codec_cases.h"
#include "veloxquant/attention.h"
#include "veloxquant/cuda.h"

namespace veloxquant::test {

struct RaggedCase {
  int n_q_heads = 4, n_queries = 1;
  std::vector<int> n_packed{130}, n_exact{70};  // of each sequence
  int sinks = 4, window = 0;
  bool causal = true, paged = false, bf16 = false, sink_logits = false, mask = false;
  float softcap = 0, logit_std = 1.5f;
  uint64_t seed = 3;
};

// One codec of a side, of 2 KV heads if not said otherwise. `what`: "2", "3 unbiased", ... bits of
// turboquant, rvq, rabitq ("mean" among them); of vecinfer "4x256 hadamard" or "4x256 dense head"
// (one table a head; int8: rounded for the fragment order); of qjl the blocks of its
// sketch, "2 outliers" with 4 outlier channels, "fixed" ones.
CasePtr ragged_codec(const std::string& method, const std::string& what, Side side, int head_dim,
                     int heads = kCaseHeads);

struct RaggedProblem {
  struct SideData {
    CasePtr codec;
    std::vector<uint8_t> blocks;  // [B][H][max_blocks][bytes], paged: [pool][H][bytes]
    std::vector<uint16_t> exact;  // [B][H][max_exact][D]
    std::vector<float> history;   // [B][H][64 max_blocks][D], what was encoded

    const Codec& made() const { return codec->codec(); }
  };

  RaggedCase c;
  int batch, heads, dim, max_blocks = 1, max_exact = 1, max_length = 1, pool = 0;
  SideData keys, values;
  std::vector<int32_t> table;               // [B][max_blocks]
  std::vector<float> q, mask, sink_logits;  // [B][Hq][Lq][D]; [B][1][Lq][max_length]
  float scale;

  RaggedProblem(const RaggedCase& given, CasePtr key_codec, CasePtr value_codec);

  int64_t block_bytes(const SideData& side) const { return side.made().block_bytes(); }
  // Steps from one sequence, head, block to the next, in bytes.
  std::array<int64_t, 3> steps(const SideData& side) const {
    const int64_t bytes = block_bytes(side);
    if (c.paged) return {0, bytes, heads * bytes};
    return {heads * max_blocks * bytes, max_blocks * bytes, bytes};
  }
  // out [B][Hq][Lq][D], lse [B][Hq][Lq]
  void oracle(std::vector<float>& out, std::vector<float>& lse) const;

 private:
  void make_side(SideData& side, ExactRandom& random);
  void oracle_of(int sequence, float* out, float* lse) const;
};

// A side in the fragment order of cuda.h: what prepare_side makes of a vecinfer case, and its
// blocks in that order, strided as those of the problem are.
struct FragmentSide {
  cuda::PreparedSide prepared;
  std::vector<uint8_t> blocks;
  std::array<int64_t, 3> steps;

  FragmentSide(const RaggedProblem& p, const RaggedProblem::SideData& side);
};

// The largest relative error of a row of dim numbers; infinite where anything is not finite.
inline double worst_row(const std::vector<float>& got, const std::vector<float>& want, int dim) {
  double worst = 0;
  for (size_t row = 0; row < want.size() / dim; ++row) {
    double error = 0, norm = 0;
    for (int d = 0; d < dim; ++d) {
      const double w = want[row * dim + d], g = got[row * dim + d];
      error += (g - w) * (g - w);
      norm += w * w;
    }
    const double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
    if (!std::isfinite(relative)) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, relative);
  }
  return worst;
}

inline CasePtr ragged_codec(const std::string& method, const std::string& what, Side side,
                            int head_dim, int heads) {
  const auto has = [&](const char* word) { return what.find(word) != std::string::npos; };
  ExactRandom random(static_cast<uint64_t>(head_dim) * 31 + what.size() + (side == Side::keys));
  auto one = std::make_shared<CodecCase>(what, method, side, head_dim, heads);
  if (method == "vecinfer") {
    const int sub_dim = std::stoi(what), centroids = std::stoi(what.substr(what.find('x') + 1));
    const int m = head_dim / sub_dim, groups = has("head") ? 1 : m;
    const std::string kind = has("hadamard") ? "hadamard" : has("dense") ? "dense" : "none";
    one->option("n_subvectors", int64_t{m}).option("transform", kind);
    std::vector<uint16_t> tables = random.halves(int64_t{heads} * groups * centroids * sub_dim);
    if (has("int8")) {
      cuda::round_tables_to_int8(
          {tables.data(), DType::float16, {heads, groups, centroids, sub_dim}});
    }
    one->table("tables", tables, {heads, groups, centroids, sub_dim});
    if (kind == "hadamard") {
      std::vector<float> scale;
      for (int i = 0; i < heads * head_dim; ++i) scale.push_back(random.scale());
      one->table("scale", scale, {heads, head_dim});
    }
    if (kind == "dense") {
      for (const char* name : {"encode_matrix", "query_matrix"}) {
        std::vector<float> matrix = random.values(int64_t{heads} * head_dim * head_dim);
        for (float& x : matrix) x /= std::sqrt(static_cast<float>(head_dim));
        one->table(name, matrix, {heads, head_dim, head_dim});
      }
    }
  } else if (method == "qjl") {
    one->option("sketch_bits", int64_t{std::stoi(what)} * head_dim).option("seed", int64_t{9});
    if (has("outliers")) one->option("outliers", int64_t{4});
    if (has("fixed")) {
      std::vector<int32_t> channels;
      for (int i = 0; i < 4 * heads; ++i) channels.push_back((i * 5 + 3) % head_dim);
      one->table("outlier_channels", channels, {heads, 4});
    }
  } else {
    one->option("bits", int64_t{std::stoi(what)}).option("seed", int64_t{5});
    for (const char* scale : {"raw", "unbiased", "reconstruction", "norm"}) {
      if (has(scale)) one->option("scale", std::string(scale));
    }
    if (has("prod")) one->option("prod", int64_t{1});
    if (has("mean")) {
      one->table("mean", random.values(int64_t{heads} * head_dim), {heads, head_dim});
    }
  }
  one->make();
  return one;
}

inline FragmentSide::FragmentSide(const RaggedProblem& p, const RaggedProblem::SideData& side) {
  const CodecCase& one = *side.codec;
  const auto option = [&](const char* name) { return one.spec().options.at(name); };
  const auto table = [&](const char* name) {
    return one.has_table(name) ? one.given(name) : TensorView();
  };
  const std::string kind = std::get<std::string>(option("transform"));
  Transform transform;
  transform.kind = kind == "hadamard" ? TransformKind::hadamard
                   : kind == "dense"  ? TransformKind::dense
                                      : TransformKind::none;
  transform.scale = table("scale");
  transform.encode_matrix = table("encode_matrix");
  transform.query_matrix = table("query_matrix");
  const int m = static_cast<int>(std::get<int64_t>(option("n_subvectors")));
  prepared = cuda::prepare_side(one.spec().side, p.heads, p.dim, m, table("tables"), transform);
  const int64_t from_bytes = p.block_bytes(side), bytes = prepared.format.block_bytes();
  const int chunks = prepared.format.n_chunks;
  const int64_t n_blocks = static_cast<int64_t>(side.blocks.size()) / from_bytes;
  blocks.assign(n_blocks * bytes, 0);
  for (int64_t n = 0; n < n_blocks; ++n) {
    for (int t = 0; t < 64; ++t) {
      for (int i = 0; i < m; ++i) {
        const int at = one.spec().side == Side::keys ? vecinfer::key_offset(chunks, t % 32, i)
                                                     : vecinfer::value_offset(chunks, t % 32, i);
        blocks[n * bytes + t / 32 * vecinfer::fragment_step_bytes(chunks) + at] =
            side.blocks[n * from_bytes + 64 * i + t];
      }
    }
  }
  steps = p.steps(side);
  for (int64_t& step : steps) step = step / from_bytes * bytes;
}

inline RaggedProblem::RaggedProblem(const RaggedCase& given, CasePtr key_codec, CasePtr value_codec)
    : c(given) {
  keys.codec = std::move(key_codec);
  values.codec = std::move(value_codec);
  batch = static_cast<int>(c.n_packed.size());
  heads = keys.made().n_kv_heads();
  dim = keys.made().head_dim();
  for (int b = 0; b < batch; ++b) {
    max_blocks = std::max(max_blocks, (c.n_packed[b] + 63) / 64);
    max_exact = std::max(max_exact, c.n_exact[b]);
    max_length = std::max(max_length, c.n_packed[b] + c.n_exact[b]);
  }
  ExactRandom random(c.seed);
  if (c.paged) {
    // Blocks of all sequences mixed up; entries beyond a sequence's own must not be followed.
    pool = batch * max_blocks + 3;
    std::vector<int32_t> order(pool);
    for (int i = 0; i < pool; ++i) order[i] = i;
    for (int i = pool - 1; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
    for (int b = 0; b < batch; ++b) {
      for (int n = 0; n < max_blocks; ++n) {
        const bool own = 64 * n < c.n_packed[b];
        table.push_back(own ? order[b * max_blocks + n] : (n % 2 == 0 ? -7 : 1 << 30));
      }
    }
  }
  make_side(keys, random);
  make_side(values, random);
  q = random.values(int64_t{batch} * c.n_q_heads * c.n_queries * dim);
  for (float& x : q) x = bf16_to_f32(f32_to_bf16(x));  // the same in every type
  scale = c.logit_std / std::sqrt(static_cast<float>(dim));
  if (c.sink_logits) sink_logits = random.values(c.n_q_heads);
  if (c.mask) {
    mask = random.values(int64_t{batch} * c.n_queries * max_length);
    for (float& x : mask) x = x < -1.2f ? -std::numeric_limits<float>::infinity() : x;
  }
}

inline void RaggedProblem::make_side(SideData& side, ExactRandom& random) {
  const int64_t bytes = block_bytes(side), tokens = 64 * int64_t{max_blocks};
  side.history = random.values(int64_t{batch} * heads * tokens * dim);
  for (float& x : side.history) x = bf16_to_f32(f32_to_bf16(x));
  side.blocks.assign((c.paged ? int64_t{pool} : int64_t{batch} * max_blocks) * heads * bytes, 0xa5);
  const auto step = steps(side);
  parallel_for(static_cast<long>(batch) * heads * max_blocks, [&](long i) {
    const int n = static_cast<int>(i) % max_blocks, pair = static_cast<int>(i) / max_blocks;
    const int b = pair / heads, h = pair % heads;
    const int count = std::min(64, c.n_packed[b] - 64 * n);
    if (count <= 0) return;
    const int64_t at = c.paged ? table[b * max_blocks + n] : n;
    side.made().encode_block(default_backend(), {b, h, c.sinks + 64 * int64_t{n}},
                             side.history.data() + (pair * tokens + 64 * int64_t{n}) * dim, count,
                             side.blocks.data() + b * step[0] + h * step[1] + at * step[2]);
  });
  for (int64_t i = 0; i < int64_t{batch} * heads * max_exact * dim; ++i) {
    const float x = random.value();
    side.exact.push_back(c.bf16 ? f32_to_bf16(x) : f32_to_f16(x));
  }
}

inline void RaggedProblem::oracle(std::vector<float>& out, std::vector<float>& lse) const {
  const int64_t rows = int64_t{c.n_q_heads} * c.n_queries;
  out.assign(batch * rows * dim, 0.0f);
  // A row that sees nothing: the logit of its sink, if it has one.
  lse.assign(batch * rows, -std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < batch * rows && c.sink_logits; ++i) {
    lse[i] = sink_logits[i % rows / c.n_queries];
  }
  for (int b = 0; b < batch; ++b) oracle_of(b, &out[b * rows * dim], &lse[b * rows]);
}

inline void RaggedProblem::oracle_of(int b, float* out, float* lse) const {
  const int64_t D = dim, n_packed = c.n_packed[b], n_exact = c.n_exact[b];
  const int64_t length = n_packed + n_exact, sinks = std::min<int64_t>(c.sinks, n_exact);
  // Queries before the first token see nothing.
  const int64_t skipped = std::max<int64_t>(0, c.n_queries - length), n = c.n_queries - skipped;
  if (n == 0) return;
  if (!c.causal && skipped > 0) fail("[RaggedProblem] a query without a position sees all");
  KeyValueSource source;
  source.exact_dtype = c.bf16 ? DType::bfloat16 : DType::float16;
  source.key_codec = keys.codec->codec_ptr();
  source.value_codec = values.codec->codec_ptr();
  source.length = length;
  source.visibility.tail_start = sinks + n_packed;
  const int n_blocks = static_cast<int>((n_packed + 63) / 64);
  std::vector<uint8_t> blocks[2];
  PackedRun run;
  for (int k = 0; k < 2 && n_blocks > 0; ++k) {
    const SideData& side = k == 0 ? keys : values;
    const int64_t bytes = block_bytes(side);
    const auto step = steps(side);
    blocks[k].resize(heads * n_blocks * bytes);
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < n_blocks; ++i) {
        const int64_t at = c.paged ? table[b * max_blocks + i] : i;
        std::copy_n(side.blocks.data() + b * step[0] + h * step[1] + at * step[2], bytes,
                    blocks[k].data() + (h * int64_t{n_blocks} + i) * bytes);
      }
    }
    (k == 0 ? run.keys : run.values) = blocks[k].data();
    (k == 0 ? run.key_head_stride : run.value_head_stride) = n_blocks * bytes;
    (k == 0 ? run.key_batch_stride : run.value_batch_stride) = heads * n_blocks * bytes;
  }
  if (n_blocks > 0) {
    run.n_blocks = n_blocks;
    run.last_count = static_cast<int>(n_packed - 64 * (n_blocks - 1));
    run.start = sinks;
    source.packed.push_back(run);
  }
  const auto exact = [&](const SideData& side, int64_t first, int64_t count) {
    TensorView view(side.exact.data() + (int64_t{b} * heads * max_exact + first) * D,
                    source.exact_dtype, {1, heads, count, D});
    view.stride = {int64_t{heads} * max_exact * D, int64_t{max_exact} * D, D, 1};
    return view;
  };
  if (sinks > 0) source.exact.push_back({exact(keys, 0, sinks), exact(values, 0, sinks), 0});
  if (n_exact > sinks) {
    source.exact.push_back({exact(keys, sinks, n_exact - sinks),
                            exact(values, sinks, n_exact - sinks), sinks + n_packed});
  }
  const int64_t hq = c.n_q_heads, lq = c.n_queries;
  TensorView queries(q.data() + (b * hq * lq + skipped) * D, DType::float32, {1, hq, n, D});
  queries.stride = {hq * lq * D, lq * D, D, 1};
  MutableTensorView to(out + skipped * D, DType::float32, {1, hq, n, D});
  to.stride = queries.stride;
  MutableTensorView lse_to(lse + skipped, DType::float32, {1, hq, n});
  lse_to.stride = {hq * lq, lq, 1};
  AttentionParams params;
  params.scale = scale;
  params.mask.causal = c.causal;
  params.mask.sliding_window = c.window;
  params.logit_softcap = c.softcap;
  if (c.sink_logits) params.sink_logits = TensorView(sink_logits.data(), DType::float32, {hq});
  if (c.mask) {
    params.mask.array = TensorView(mask.data() + (b * lq + skipped) * max_length, DType::float32,
                                   {1, hq, n, length});
    params.mask.array.stride = {0, 0, max_length, 1};
  }
  attend_oracle(queries, source, params, to, lse_to);
}

}  // namespace veloxquant::test
