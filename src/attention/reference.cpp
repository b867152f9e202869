// The reference path: plain loops on the codes, fp64 sums. It says what the fast paths compute:
// packed tokens in codec coordinates with the transformed query, exact tokens in the original
// ones, two online softmaxes, one merge.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "src/attention/element.h"
#include "src/attention/problem.h"

namespace veloxquant::attention {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kRowsAtOnce = 64;

// Running maximum, sum of exp(score - max) and weighted sum of the values.
struct SoftmaxState {
  double max = -kInfinity;
  double sum = 0;
  std::vector<double> out;

  // The score must be finite.
  void add(double score, const float* value) {
    if (score > max) {
      double shrink = std::exp(max - score);
      sum *= shrink;
      for (double& x : out) x *= shrink;
      max = score;
    }
    double p = std::exp(score - max);
    sum += p;
    for (size_t d = 0; d < out.size(); ++d) out[d] += p * value[d];
  }
};

struct RowBlock {
  int b;
  int kv_head;
  int64_t first_row;
  int64_t n_rows;
};

void load_tile(const Problem& p, const RowBlock& rows, const Tile& tile, float* keys,
               float* values) {
  if (tile.packed) {
    const KeyValueSource& source = p.source;
    const BlockPlace place{rows.b, rows.kv_head, tile.position};
    source.key_codec->decode_block(Backend::reference, place,
                                   p.key_block(rows.b, rows.kv_head, tile), tile.count, keys,
                                   p.head_dim);
    source.value_codec->decode_block(Backend::reference, place,
                                     p.value_block(rows.b, rows.kv_head, tile), tile.count, values,
                                     p.head_dim);
    return;
  }
  const ExactRun& run = p.source.exact[tile.run];
  for (int t = 0; t < tile.count; ++t) {
    const void* key = run.keys.at(rows.b, rows.kv_head, tile.offset + t);
    const void* value = run.values.at(rows.b, rows.kv_head, tile.offset + t);
    for (int d = 0; d < p.head_dim; ++d) {
      keys[t * p.head_dim + d] =
          as_kept(load_element(key, run.keys.dtype, d), p.source.exact_dtype);
      values[t * p.head_dim + d] =
          as_kept(load_element(value, run.values.dtype, d), p.source.exact_dtype);
    }
  }
}

void add_tile(const Problem& p, const RowBlock& rows, const Tile& tile, const float* q,
              const float* keys, const float* values, std::vector<SoftmaxState>& states) {
  const double cap = p.params.logit_softcap;
  float mask[kBlockTokens] = {};
  for (int64_t r = 0; r < rows.n_rows; ++r) {
    int64_t row = rows.first_row + r;
    Interval seen = p.visible(tile, p.position_of(row));
    int64_t begin = std::max<int64_t>(seen.begin - tile.position, 0);
    int64_t end = std::min<int64_t>(seen.end - tile.position, tile.count);
    if (p.has_mask_array()) {
      p.load_mask(rows.b, p.q_head_of(rows.kv_head, row), p.query_of(row), tile.position,
                  tile.count, mask);
    }
    for (int64_t t = begin; t < end; ++t) {
      double score = 0;
      for (int d = 0; d < p.head_dim; ++d) {
        score += static_cast<double>(q[r * p.head_dim + d]) * keys[t * p.head_dim + d];
      }
      score *= p.params.scale;
      if (cap > 0) score = cap * std::tanh(score / cap);
      score += mask[t];
      if (score == -kInfinity) continue;
      states[r].add(score, values + t * p.head_dim);
    }
  }
}

// Tiles [begin, end) of one form -> one state per row; out is normalised and in the original
// coordinates afterwards.
std::vector<SoftmaxState> attend_form(const Problem& p, const RowBlock& rows, int64_t begin,
                                      int64_t end, bool packed) {
  const size_t D = p.head_dim;
  std::vector<SoftmaxState> states(rows.n_rows);
  for (SoftmaxState& state : states) state.out.assign(D, 0);
  if (begin == end) return states;

  std::vector<float> q(rows.n_rows * D), keys(kBlockTokens * D), values(kBlockTokens * D);
  p.load_queries(rows.b, rows.kv_head, rows.first_row, rows.n_rows, q.data());
  if (packed) p.source.key_codec->transform_query(rows.kv_head, q.data(), rows.n_rows);
  for (int64_t i = begin; i < end; ++i) {
    load_tile(p, rows, p.tiles[i], keys.data(), values.data());
    add_tile(p, rows, p.tiles[i], q.data(), keys.data(), values.data(), states);
  }
  std::vector<float> row(D);
  for (SoftmaxState& state : states) {
    if (state.sum == 0) continue;
    for (size_t d = 0; d < D; ++d) row[d] = static_cast<float>(state.out[d] / state.sum);
    if (packed) p.source.value_codec->inverse(rows.kv_head, row.data(), 1);
    state.out.assign(row.begin(), row.end());
  }
  return states;
}

void finish_row(const Problem& p, const RowBlock& rows, int64_t r, const SoftmaxState& packed,
                const SoftmaxState& exact) {
  int64_t row = rows.first_row + r;
  int head = p.q_head_of(rows.kv_head, row);
  double sink = p.sink_logit(head);
  double top = std::max({packed.max, exact.max, sink});
  bool empty = top == -kInfinity;
  double packed_weight = empty ? 0 : packed.sum * std::exp(packed.max - top);
  double exact_weight = empty ? 0 : exact.sum * std::exp(exact.max - top);
  double total = empty ? 1 : packed_weight + exact_weight + std::exp(sink - top);
  void* out = p.out.at(rows.b, head, p.query_of(row));
  for (int d = 0; d < p.head_dim; ++d) {
    double sum = packed_weight * packed.out[d] + exact_weight * exact.out[d];
    store_element(out, p.out.dtype, d, static_cast<float>(sum / total));
  }
  if (!p.lse.empty()) {
    *static_cast<float*>(p.lse.at(rows.b, head, p.query_of(row))) =
        static_cast<float>(top + std::log(total));
  }
}

}  // namespace

void attend_reference(const Problem& p) {
  const int64_t blocks_per_head = (p.n_rows() + kRowsAtOnce - 1) / kRowsAtOnce;
  const int64_t n_heads = int64_t{p.batch} * p.n_kv_heads;
  parallel_for(n_heads * blocks_per_head, [&](long item) {
    RowBlock rows;
    rows.b = static_cast<int>(item / blocks_per_head / p.n_kv_heads);
    rows.kv_head = static_cast<int>(item / blocks_per_head % p.n_kv_heads);
    rows.first_row = item % blocks_per_head * kRowsAtOnce;
    rows.n_rows = std::min(kRowsAtOnce, p.n_rows() - rows.first_row);
    auto packed = attend_form(p, rows, 0, p.n_packed_tiles, true);
    auto exact =
        attend_form(p, rows, p.n_packed_tiles, static_cast<int64_t>(p.tiles.size()), false);
    for (int64_t r = 0; r < rows.n_rows; ++r) finish_row(p, rows, r, packed[r], exact[r]);
  });
}

}  // namespace veloxquant::attention
