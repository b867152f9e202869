// Codebooks of VecInfer: transform, cut into sub-vectors, one k-means each, round the entries.
#include <algorithm>
#include <cmath>

#include "src/calibration/float_rows.h"
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

// Vectors of all sub-vectors together: [d][count] out of y [M * d][n].
std::vector<float> pooled(const std::vector<float>& y, int64_t n, int n_subvectors, int sub_dim,
                          SplitMix64 random) {
  const std::vector<int64_t> picks = subsample(n * n_subvectors, kMaxTrainingVectors, random);
  const int64_t count = static_cast<int64_t>(picks.size());
  std::vector<float> pool(sub_dim * count);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t m = picks[k] / n, t = picks[k] % n;
    for (int i = 0; i < sub_dim; ++i) pool[i * count + k] = y[(m * sub_dim + i) * n + t];
  }
  return pool;
}

struct SquaredSums {
  double error = 0;   // sum |y - y^|^2
  double energy = 0;  // sum |y|^2
};

// One k-means; writes table (h, m) and returns its error with the centroids as rounded.
SquaredSums train_one(const float* y, int64_t stride, int64_t n, const KMeansParams& params,
                      TableEntries entries, int64_t h, int64_t m, const MutableTensorView& tables) {
  // Of int8, 127 * 2^9: the next power of two would leave fp16.
  const float largest = entries == TableEntries::int8 ? 65024.0f : 65504.0f;
  const int sub_dim = static_cast<int>(tables.shape[3]);
  std::vector<float> centroids = kmeans(y, stride, n, sub_dim, params).centroids;
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
  std::vector<uint16_t> codes(n);
  std::vector<float> distance(n);
  nearest_centroids(default_backend(), y, stride, n, centroids.data(), params.n_centroids, sub_dim,
                    codes.data(), distance.data());
  SquaredSums sums;
  for (float d : distance) sums.error += d;
  for (int i = 0; i < sub_dim; ++i) {
    for (int64_t t = 0; t < n; ++t) {
      const double value = y[i * stride + t];
      sums.energy += value * value;
    }
  }
  return sums;
}

}  // namespace

TableReport train_vecinfer_tables(const TensorView& x, const Transform& transform, int n_subvectors,
                                  bool per_head, const KMeansParams& params,
                                  const MutableTensorView& tables,
                                  const std::function<void(double)>& progress,
                                  TableEntries entries) {
  require_float_rows(x, "train_vecinfer_tables");
  const int64_t heads = x.shape[0], dims = x.shape[2];
  require(n_subvectors >= 1 && dims % n_subvectors == 0,
          "[train_vecinfer_tables] n_subvectors: got ", n_subvectors,
          ", wanted a divisor of head_dim = ", dims);
  const int64_t per = per_head ? 1 : n_subvectors, sub_dim = dims / n_subvectors;
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
    const int64_t n = static_cast<int64_t>(tokens.size());

    const auto train = [&](int64_t m, const float* from, int64_t count) {
      KMeansParams own = params;
      own.seed = SplitMix64(params.seed, h * per + m).next();
      errors[h * per + m] = train_one(from, count, count, own, entries, h, m, tables);
      done.step();
    };
    if (per_head) {
      const auto pool = pooled(y, n, n_subvectors, static_cast<int>(sub_dim),
                               SplitMix64(params.seed, kPoolStream + h));
      train(0, pool.data(), static_cast<int64_t>(pool.size()) / sub_dim);
    } else {
      parallel_for(n_subvectors, [&](long m) { train(m, y.data() + m * sub_dim * n, n); });
    }
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
