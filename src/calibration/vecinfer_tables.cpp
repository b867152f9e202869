// Codebooks of VecInfer: transform, cut into sub-vectors, one k-means a table, round the entries.
#include <algorithm>
#include <cmath>

#include "src/calibration/float_rows.h"
#include "src/calibration/lloyd.h"
#include "src/calibration/progress.h"
#include "src/calibration/random.h"
#include "src/calibration/sampling.h"
#include "veloxquant/backend.h"
#include "veloxquant/calibration.h"
#include "veloxquant/cuda.h"

namespace veloxquant {
namespace {

// Streams of SplitMix64 that no k-means problem uses.
constexpr uint64_t kTokenStream = uint64_t{1} << 62;
constexpr uint64_t kPoolStream = uint64_t{2} << 62;

// Codec coordinates of the tokens, dimension-major: [D][tokens].
std::vector<float> transformed(const TensorView& x, int64_t head,
                               const std::vector<int64_t>& tokens, const Codec& codec) {
  constexpr int64_t kChunk = 256;
  const int64_t dims = x.shape[2], n = static_cast<int64_t>(tokens.size());
  std::vector<float> y(dims * n);
  parallel_for((n + kChunk - 1) / kChunk, [&](long chunk) {
    const int64_t start = chunk * kChunk, count = std::min(kChunk, n - start);
    std::vector<float> rows(count * dims);
    for (int64_t t = 0; t < count; ++t) {
      read_row(x, head, tokens[start + t], rows.data() + t * dims);
    }
    codec.forward(static_cast<int>(head), rows.data(), count);
    for (int64_t i = 0; i < dims; ++i) {
      for (int64_t t = 0; t < count; ++t) y[i * n + start + t] = rows[t * dims + i];
    }
  });
  return y;
}

// What the k-means of a table sees: vectors [d][n], and what each counts (none: 1).
struct Training {
  std::vector<float> vectors, weights;
  int64_t n = 0;
};

// The sub-vectors first, first + step, ... of y [M * d][n] together. weights: of the n tokens, or
// none.
Training pooled(const std::vector<float>& y, const std::vector<float>& weights, int64_t n,
                int sub_dim, int first, int step, SplitMix64 random) {
  const int64_t all = static_cast<int64_t>(y.size()) / (n * sub_dim);
  const int64_t share = (all - first + step - 1) / step;
  const std::vector<int64_t> picks = subsample(n * share, kMaxTrainingVectors, random);
  Training pool;
  pool.n = static_cast<int64_t>(picks.size());
  pool.vectors.resize(sub_dim * pool.n);
  for (int64_t k = 0; k < pool.n; ++k) {
    const int64_t m = first + step * (picks[k] / n), t = picks[k] % n;
    for (int i = 0; i < sub_dim; ++i) pool.vectors[i * pool.n + k] = y[(m * sub_dim + i) * n + t];
    if (!weights.empty()) pool.weights.push_back(weights[t]);
  }
  return pool;
}

struct SquaredSums {
  double error = 0;   // sum w |y - y^|^2
  double energy = 0;  // sum w |y|^2
};

// One k-means; writes table (h, m) and returns its error with the centroids as rounded.
SquaredSums train_one(const Vectors& y, const KMeansParams& params, TableEntries entries, int64_t h,
                      int64_t m, const MutableTensorView& tables) {
  // Of int8, 127 * 2^9: the next power of two would leave fp16.
  const float largest = entries == TableEntries::int8 ? 65024.0f : 65504.0f;
  const int sub_dim = y.sub_dim;
  std::vector<float> centroids =
      kmeans(y.data, y.stride, y.n, sub_dim, params, y.weights).centroids;
  std::vector<uint16_t> rounded(centroids.size());
  for (size_t i = 0; i < centroids.size(); ++i) {
    rounded[i] = f32_to_f16(std::clamp(centroids[i], -largest, largest));
  }
  if (entries == TableEntries::int8) {
    cuda::round_tables_to_int8(
        MutableTensorView(rounded.data(), DType::float16, {params.n_centroids, sub_dim}));
  }
  for (int c = 0; c < params.n_centroids; ++c) {
    for (int i = 0; i < sub_dim; ++i) {
      const size_t at = static_cast<size_t>(c) * sub_dim + i;
      *static_cast<uint16_t*>(tables.at(h, m, c, i)) = rounded[at];
      centroids[at] = f16_to_f32(rounded[at]);
    }
  }
  std::vector<uint16_t> codes(y.n);
  std::vector<float> distance(y.n);
  nearest_centroids(default_backend(), y.data, y.stride, y.n, centroids.data(), params.n_centroids,
                    sub_dim, codes.data(), distance.data());
  SquaredSums sums;
  for (int64_t t = 0; t < y.n; ++t) sums.error += y.weight(t) * distance[t];
  for (int i = 0; i < sub_dim; ++i) {
    for (int64_t t = 0; t < y.n; ++t) {
      const double value = *y.at(i, t);
      sums.energy += y.weight(t) * value * value;
    }
  }
  return sums;
}

}  // namespace

TableReport train_vecinfer_tables(const TensorView& x, const Transform& transform, int n_subvectors,
                                  int n_tables, const KMeansParams& params,
                                  const MutableTensorView& tables,
                                  const std::function<void(double)>& progress, TableEntries entries,
                                  const TensorView& token_weights) {
  require_float_rows(x, "train_vecinfer_tables");
  require_token_weights(token_weights, x, "train_vecinfer_tables");
  const int64_t heads = x.shape[0], dims = x.shape[2];
  require(n_subvectors >= 1 && dims % n_subvectors == 0,
          "[train_vecinfer_tables] n_subvectors: got ", n_subvectors,
          ", wanted a divisor of head_dim = ", dims);
  require(n_tables >= 1 && n_tables <= n_subvectors, "[train_vecinfer_tables] n_tables: got ",
          n_tables, ", wanted 1 to n_subvectors = ", n_subvectors);
  const int64_t per = n_tables, sub_dim = dims / n_subvectors;
  require(!tables.empty() && tables.dtype == DType::float16 && tables.ndim == 4 &&
              tables.shape[0] == heads && tables.shape[1] == per &&
              tables.shape[2] == params.n_centroids && tables.shape[3] == sub_dim,
          "[train_vecinfer_tables] tables: got ", dtype_name(tables.dtype), " with ", tables.ndim,
          " dimensions, wanted float16 [", heads, ", ", per, ", ", params.n_centroids, ", ",
          sub_dim, "]");
  require(params.n_centroids >= 2 && params.n_centroids <= 4096,
          "[train_vecinfer_tables] n_centroids: got ", params.n_centroids, ", wanted 2..4096");

  // Only its transform is used, and its checks of the arguments.
  const std::vector<uint16_t> no_centroids(heads * 2 * sub_dim, 0);
  const CodecPtr codec = make_vecinfer_codec(
      Side::keys, static_cast<int>(heads), static_cast<int>(dims), n_subvectors,
      TensorView(no_centroids.data(), DType::float16, {heads, 1, 2, sub_dim}), transform);

  std::vector<SquaredSums> errors(heads * per);
  Progress done(heads * per, progress);
  parallel_for(heads, [&](long h) {
    std::vector<int64_t> tokens = finite_tokens(x, h);
    require(!tokens.empty(), "[train_vecinfer_tables] x: no token of head ", h, " is finite");
    const auto picks = subsample(static_cast<int64_t>(tokens.size()), kMaxTrainingVectors,
                                 SplitMix64(params.seed, kTokenStream + h));
    for (size_t i = 0; i < picks.size(); ++i) tokens[i] = tokens[picks[i]];
    tokens.resize(picks.size());
    const std::vector<float> y = transformed(x, h, tokens, *codec);
    const std::vector<float> weights = weights_of(token_weights, h, tokens);
    const int64_t n = static_cast<int64_t>(tokens.size());

    parallel_for(n_tables, [&](long m) {
      KMeansParams own = params;
      own.seed = SplitMix64(params.seed, h * per + m).next();
      Vectors seen{y.data() + m * sub_dim * n, n, n, static_cast<int>(sub_dim),
                   weights.empty() ? nullptr : weights.data()};
      Training pool;
      if (n_tables < n_subvectors) {
        pool = pooled(y, weights, n, seen.sub_dim, static_cast<int>(m), n_tables,
                      SplitMix64(params.seed, kPoolStream + h * per + m));
        seen.data = pool.vectors.data();
        seen.stride = seen.n = pool.n;
        seen.weights = pool.weights.empty() ? nullptr : pool.weights.data();
      }
      errors[h * per + m] = train_one(seen, own, entries, h, m, tables);
      done.step();
    });
  });

  TableReport report;
  for (int64_t h = 0; h < heads; ++h) {
    SquaredSums sums;
    for (int64_t m = 0; m < per; ++m) {
      sums.error += errors[h * per + m].error;
      sums.energy += errors[h * per + m].energy;
    }
    report.relative_error.push_back(sums.energy > 0.0 ? sums.error / sums.energy : 0.0);
  }
  return report;
}

}  // namespace veloxquant
