// Random calls of rvq_attend against attention in fp64 over the decoded keys and values; nothing
// out of bounds: see tests/support/fuzz.h.
#include <gtest/gtest.h>

#include <algorithm>

#include "src/math/float16.h"
#include "tests/support/fuzz.h"
#include "veloxquant/rvq_attend.h"

namespace veloxquant::test {
namespace {

struct Call {
  RvqAttendProblem p;
  std::vector<float> q, norms, mask;
  std::vector<uint8_t> keys1, keys2, values;

  explicit Call(ExactRandom& random) {
    p.batch = 1 + random.below(2);
    p.kv_heads = 1 + random.below(3);
    p.heads = p.kv_heads * (1 + random.below(5));
    p.dim = one_of(random, {1, 3, 8, 16, 20, 64});
    p.sub_dim = one_of(random, {1, 2, 4, 5, 8});
    p.n_subvectors = 1 + random.below(6);
    p.n_queries = 1 + random.below(3);
    p.n_tokens = random.below(8) ? 1 + random.below(150) : random.below(8) ? 0 : 1100;
    p.scale = 0.25f;
    p.causal = random.below(2) != 0;
    p.sliding_window = random.below(3) ? 0 : 1 + random.below(100);
    const int64_t tokens = int64_t{p.batch} * p.kv_heads * p.n_tokens;
    q = random.values(int64_t{p.batch} * p.heads * p.n_queries * p.dim);
    keys1 = any_bytes<uint8_t>(random, tokens * p.dim);
    keys2 = any_bytes<uint8_t>(random, tokens * p.dim);
    values = any_bytes<uint8_t>(random, tokens * p.n_subvectors);
    p.centroids1 = random.values(1 << random.below(9));
    p.centroids2 = random.values(1 << random.below(9));
    p.value_table = random.values(int64_t{1 + random.below(256)} * p.sub_dim);
    if (random.below(2)) norms = random.values(tokens);
    if (random.below(3) == 0) {  // [H, 1, S], the same for every batch and query
      mask.resize(p.heads * p.n_tokens);
      for (float& v : mask) v = random.below(4) ? random.value() : -INFINITY;
      p.mask_stride[1] = p.n_tokens;
      p.mask_stride[3] = 1;
    }
    p.q = q.data();
    p.keys1 = keys1.data();
    p.keys2 = keys2.data();
    p.values = values.data();
    p.norms = norms.empty() ? nullptr : norms.data();
    p.mask = mask.empty() ? nullptr : mask.data();
  }

  template <class Table>
  static float entry(const Table& table, int code, int64_t step = 1, int64_t part = 0) {
    const int64_t last = static_cast<int64_t>(table.size()) / step - 1;
    return table[std::min<int64_t>(code, last) * step + part];
  }

  // One output row in fp64; sizes[i]: the sum of what was added up to out[i], as magnitudes.
  void row(int64_t b, int64_t h, int64_t s, std::vector<double>& out,
           std::vector<double>& sizes) const {
    const int64_t kv = b * p.kv_heads + h / (p.heads / p.kv_heads);
    const int64_t position = p.n_tokens - p.n_queries + s;
    std::vector<double> scores(p.n_tokens, -INFINITY);
    double most = -INFINITY, sum = 0.0;
    for (int64_t t = 0; t < p.n_tokens; ++t) {
      if (p.causal && t > position) continue;
      if (p.sliding_window > 0 && t <= position - p.sliding_window) continue;
      double score = 0.0;
      for (int d = 0; d < p.dim; ++d) {
        const int64_t at = (kv * p.n_tokens + t) * p.dim + d;
        score += double(q[((b * p.heads + h) * p.n_queries + s) * p.dim + d]) *
                 (double(entry(p.centroids1, keys1[at])) + entry(p.centroids2, keys2[at]));
      }
      score *= p.scale * (norms.empty() ? 1.0 : norms[kv * p.n_tokens + t]);
      scores[t] = score + (mask.empty() ? 0.0 : mask[h * p.n_tokens + t]);
      most = std::max(most, scores[t]);
    }
    const int64_t width = int64_t{p.n_subvectors} * p.sub_dim;
    out.assign(width, 0.0);
    sizes.assign(width, 0.0);
    if (most == -INFINITY) return;
    for (int64_t t = 0; t < p.n_tokens; ++t) sum += std::exp(scores[t] - most);
    for (int64_t t = 0; t < p.n_tokens; ++t) {
      const double weight = std::exp(scores[t] - most) / sum;
      for (int64_t i = 0; i < width; ++i) {
        const int code = values[(kv * p.n_tokens + t) * p.n_subvectors + i / p.sub_dim];
        const double value = entry(p.value_table, code, p.sub_dim, i % p.sub_dim);
        out[i] += weight * value;
        sizes[i] += weight * std::abs(value);
      }
    }
  }
};

TEST(Fuzz, RvqAttend) {
  fuzz("rvq_attend", [](ExactRandom& random) {
    const Call call(random);
    const RvqAttendProblem& p = call.p;
    const int64_t width = int64_t{p.n_subvectors} * p.sub_dim;
    std::vector<uint16_t> out(int64_t{p.batch} * p.heads * p.n_queries * width, 0x7e00u);
    rvq_attend(p, out.data());
    std::vector<double> wanted, sizes;
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t h = 0; h < p.heads; ++h) {
        for (int64_t s = 0; s < p.n_queries; ++s) {
          call.row(b, h, s, wanted, sizes);
          const uint16_t* got = &out[((b * p.heads + h) * p.n_queries + s) * width];
          for (int64_t i = 0; i < width; ++i) {
            EXPECT_NEAR(f16_to_f32(got[i]), wanted[i], 1e-3 * sizes[i] + 1e-7);
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace veloxquant::test
