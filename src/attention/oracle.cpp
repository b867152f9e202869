// The oracle: attention in fp64 over the dequantised tokens, in the original coordinates, written
// from the definitions in attention.h alone. It brings the whole history back, so it is slow and
// for tests only.
#include <cmath>
#include <limits>
#include <vector>

#include "src/attention/element.h"
#include "veloxquant/attention.h"

namespace veloxquant {
namespace {

using attention::as_kept;
using attention::load_element;
using attention::store_element;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Token {
  int64_t position;
  bool is_code;
  std::vector<float> key, value;
};

// x^ of one block: decoded, then taken back to the original coordinates.
std::vector<float> dequantise(const Codec& codec, const BlockPlace& place, const uint8_t* block,
                              int count) {
  std::vector<float> x(static_cast<size_t>(count) * codec.head_dim());
  codec.decode_block(Backend::reference, place, block, count, x.data(), codec.head_dim());
  codec.inverse(place.kv_head, x.data(), count);
  return x;
}

std::vector<float> kept_row(const TensorView& view, DType keep, int b, int h, int64_t token) {
  std::vector<float> row(view.shape[3]);
  for (size_t d = 0; d < row.size(); ++d) {
    row[d] = as_kept(load_element(view.at(b, h, token), view.dtype, d), keep);
  }
  return row;
}

// Every token of one KV head in every form it exists in.
std::vector<Token> all_tokens(const KeyValueSource& source, int b, int h) {
  std::vector<Token> tokens;
  for (const PackedRun& run : source.packed) {
    for (int block = 0; block < run.n_blocks; ++block) {
      int count = block + 1 < run.n_blocks ? kBlockTokens : run.last_count;
      const uint8_t* keys = run.keys + b * run.key_batch_stride + h * run.key_head_stride +
                            block * source.key_codec->block_bytes();
      const uint8_t* values = run.values + b * run.value_batch_stride + h * run.value_head_stride +
                              block * source.value_codec->block_bytes();
      const BlockPlace place{b, h, run.start + int64_t{kBlockTokens} * block};
      auto k = dequantise(*source.key_codec, place, keys, count);
      auto v = dequantise(*source.value_codec, place, values, count);
      int D = source.key_codec->head_dim();
      for (int t = 0; t < count; ++t) {
        tokens.push_back({run.start + int64_t{kBlockTokens} * block + t,
                          true,
                          {k.begin() + t * D, k.begin() + (t + 1) * D},
                          {v.begin() + t * D, v.begin() + (t + 1) * D}});
      }
    }
  }
  for (const ExactRun& run : source.exact) {
    for (int64_t t = 0; t < run.keys.shape[2]; ++t) {
      tokens.push_back({run.start + t, false, kept_row(run.keys, source.exact_dtype, b, h, t),
                        kept_row(run.values, source.exact_dtype, b, h, t)});
    }
  }
  return tokens;
}

bool is_visible(const Token& token, int64_t query, const KeyValueSource& source,
                const AttentionMask& mask) {
  if (mask.causal && token.position > query) return false;
  if (mask.sliding_window > 0 && token.position <= query - mask.sliding_window) return false;
  const Visibility& seen = source.visibility;
  bool both_forms = token.position >= seen.tail_start && seen.n_new_blocks > 0;
  if (!both_forms) return true;
  return token.is_code == (token.position < seen.code_end(query));
}

// The element of a mask that broadcasts to [B, H_q, L_q, length]; 0 or -inf for a boolean one.
double mask_at(const TensorView& array, std::array<int64_t, 4> index) {
  if (array.empty()) return 0;
  int64_t offset = 0;
  for (int d = 0; d < array.ndim; ++d) {
    if (array.shape[d] != 1) offset += index[4 - array.ndim + d] * array.stride[d];
  }
  if (array.dtype == DType::boolean) {
    return static_cast<const uint8_t*>(array.data)[offset] != 0 ? 0 : -kInfinity;
  }
  return load_element(array.data, array.dtype, offset);
}

}  // namespace

void attend_oracle(const TensorView& q, const KeyValueSource& source, const AttentionParams& params,
                   const MutableTensorView& out, const MutableTensorView& lse) {
  const int64_t B = q.shape[0], n_heads = q.shape[1], n_queries = q.shape[2], D = q.shape[3];
  const int64_t n_kv_heads = source.key_codec       ? source.key_codec->n_kv_heads()
                             : source.exact.empty() ? n_heads
                                                    : source.exact[0].keys.shape[1];
  const int64_t group = n_heads / n_kv_heads;
  const int64_t first =
      params.first_query_position >= 0 ? params.first_query_position : source.length - n_queries;
  parallel_for(B * n_kv_heads, [&](long item) {
    const int b = static_cast<int>(item / n_kv_heads), h = static_cast<int>(item % n_kv_heads);
    const std::vector<Token> tokens = all_tokens(source, b, h);
    std::vector<double> score(tokens.size()), sum(D);
    for (int64_t head = h * group; head < (h + 1) * group; ++head) {
      for (int64_t i = 0; i < n_queries; ++i) {
        double top = params.sink_logits.empty()
                         ? -kInfinity
                         : *static_cast<const float*>(params.sink_logits.at(head));
        double sink = top;
        for (size_t t = 0; t < tokens.size(); ++t) {
          score[t] = -kInfinity;
          if (!is_visible(tokens[t], first + i, source, params.mask)) continue;
          double dot = 0;
          for (int64_t d = 0; d < D; ++d) {
            dot +=
                static_cast<double>(load_element(q.at(b, head, i), q.dtype, d)) * tokens[t].key[d];
          }
          dot *= params.scale;
          if (params.logit_softcap > 0) {
            dot = params.logit_softcap * std::tanh(dot / params.logit_softcap);
          }
          score[t] = dot + mask_at(params.mask.array, {b, head, i, tokens[t].position});
          top = std::max(top, score[t]);
        }
        double total = top == -kInfinity ? 0 : std::exp(sink - top);
        std::fill(sum.begin(), sum.end(), 0);
        for (size_t t = 0; t < tokens.size(); ++t) {
          if (score[t] == -kInfinity) continue;
          double p = std::exp(score[t] - top);
          total += p;
          for (int64_t d = 0; d < D; ++d) sum[d] += p * tokens[t].value[d];
        }
        for (int64_t d = 0; d < D; ++d) {
          store_element(out.at(b, head, i), out.dtype, d,
                        total > 0 ? static_cast<float>(sum[d] / total) : 0.0f);
        }
        if (!lse.empty()) {
          *static_cast<float*>(lse.at(b, head, i)) =
              static_cast<float>(total > 0 ? top + std::log(total) : -kInfinity);
        }
      }
    }
  });
}

}  // namespace veloxquant
