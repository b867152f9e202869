// The learned rotation: eigenbasis of the keys in the metric of the queries, its directions dealt
// out to the sub-vectors so that each has the same volume to quantise (the allocation of optimised
// product quantisation: Ge, He, Ke, Sun 2013, section 3.2). shared/spec/QUALITY.md, steps 1 to 4.
// Sub-vectors that share a table get directions alike.
#include <algorithm>
#include <cmath>
#include <numeric>

// Before everything that may include Eigen.
#include "src/calibration/eigen.h"
#include "src/calibration/float_rows.h"
#include "veloxquant/backend.h"
#include "veloxquant/calibration.h"

namespace veloxquant {
namespace {

void require_float32(const TensorView& view, const char* name, std::initializer_list<int64_t> shape,
                     const char* function) {
  std::string wanted;
  for (int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  const bool fits = !view.empty() && view.dtype == DType::float32 &&
                    view.ndim == static_cast<int>(shape.size()) &&
                    std::equal(shape.begin(), shape.end(), view.shape.begin());
  require(fits, "[", function, "] ", name, ": got ", dtype_name(view.dtype), " with ", view.ndim,
          " dimensions, wanted float32 [", wanted, "]");
}

float& element(const MutableTensorView& view, int64_t h, int64_t i, int64_t j) {
  return *static_cast<float*>(view.at(h, i, j));
}

struct Moments {
  Matrix covariance;
  std::vector<double> mean;
};

// Of one head over its finite tokens, each as often as its weight says; zeros where there is no
// token. Accumulated in fp64, in chunks that do not depend on the threads.
Moments moments_of(const TensorView& x, const TensorView& token_weights, int64_t head) {
  constexpr int64_t kChunk = 4096;
  const int64_t tokens = x.shape[1], dims = x.shape[2], chunks = (tokens + kChunk - 1) / kChunk;
  std::vector<std::vector<double>> sums(chunks), firsts(chunks);
  std::vector<double> counts(chunks, 0.0);
  parallel_for(chunks, [&](long chunk) {
    std::vector<double>& sum = sums[chunk];
    std::vector<double>& first = firsts[chunk];
    sum.assign(dims * dims, 0.0);
    first.assign(dims, 0.0);
    std::vector<float> row(dims);
    std::vector<double> wide(dims);
    for (int64_t t = chunk * kChunk; t < std::min(tokens, (chunk + 1) * kChunk); ++t) {
      read_row(x, head, t, row.data());
      if (!std::all_of(row.begin(), row.end(), [](float v) { return std::isfinite(v); })) continue;
      const double weight =
          token_weights.empty() ? 1.0 : *static_cast<const float*>(token_weights.at(head, t));
      counts[chunk] += weight;
      std::copy(row.begin(), row.end(), wide.begin());
      for (int64_t i = 0; i < dims; ++i) {
        double* out = sum.data() + i * dims;
        const double weighted = weight * wide[i];
        first[i] += weighted;
        for (int64_t j = 0; j <= i; ++j) out[j] += weighted * wide[j];
      }
    }
  });
  const double all = std::accumulate(counts.begin(), counts.end(), 0.0);
  const double count = all > 0.0 ? all : 1.0;
  Moments moments{Matrix::Zero(dims, dims), std::vector<double>(dims, 0.0)};
  std::vector<double>& mean = moments.mean;
  for (int64_t i = 0; i < dims; ++i) {
    for (const auto& first : firsts) mean[i] += first[i];
    mean[i] /= count;
  }
  Matrix& moment = moments.covariance;
  for (int64_t i = 0; i < dims; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      for (const auto& sum : sums) moment(i, j) += sum[i * dims + j];
      moment(i, j) = moment(i, j) / count - mean[i] * mean[j];
      moment(j, i) = moment(i, j);
    }
  }
  return moments;
}

// w_i = sqrt(E q_i^2) over its mean, at least 1e-3: a channel that no query looks at must not
// vanish. Ones without queries.
std::vector<float> query_weight(const TensorView& query_moments, int64_t head, int64_t dims) {
  constexpr double kFloor = 1e-3;
  std::vector<double> root(dims, 0.0);
  for (int64_t i = 0; !query_moments.empty() && i < dims; ++i) {
    const float moment = *static_cast<const float*>(query_moments.at(head, i));
    if (std::isfinite(moment) && moment > 0.0f) root[i] = std::sqrt(static_cast<double>(moment));
  }
  // Dividing by the mean makes the codes independent of the scale of the queries.
  const double mean = std::accumulate(root.begin(), root.end(), 0.0) / static_cast<double>(dims);
  std::vector<float> weight(dims, 1.0f);
  for (int64_t i = 0; mean > 0.0 && i < dims; ++i) {
    weight[i] = static_cast<float>(std::max(root[i] / mean, kFloor));
  }
  return weight;
}

// Which eigenvector goes to each of the D columns. `spectrum` is ascending, as Eigen gives it. The
// sub-vectors m, m + n_tables, ... share a table, so they get directions alike: descending, as many
// eigenvectors in a row as share a table go to the table with room whose sub-vectors have the
// smallest sum of log l, the first of equals, each sub-vector one; every other two turns from the
// last sub-vector to the first, so that their volumes are alike too. l is over its minimum, so that
// every log is >= 0 and no scale matters.
std::vector<int64_t> balanced_columns(const std::vector<double>& spectrum, int64_t n_subvectors,
                                      int64_t n_tables) {
  constexpr double kFloor = 1e-6;
  const int64_t dims = static_cast<int64_t>(spectrum.size()), sub_dim = dims / n_subvectors;
  const double largest = spectrum.back(), least = std::max(spectrum.front(), kFloor * largest);
  std::vector<int64_t> columns(dims), filled(n_tables, 0);
  std::vector<double> load(n_tables, 0.0);
  for (int64_t k = dims - 1; k >= 0;) {
    int64_t best = -1;
    for (int64_t c = 0; c < n_tables; ++c) {
      if (filled[c] < sub_dim && (best < 0 || load[c] < load[best])) best = c;
    }
    const int64_t share = (n_subvectors - best + n_tables - 1) / n_tables, turn = filled[best]++;
    for (int64_t j = 0; j < share; ++j, --k) {
      const int64_t m = best + n_tables * (turn % 4 == 1 || turn % 4 == 2 ? share - 1 - j : j);
      columns[m * sub_dim + turn] = k;
      if (largest > 0.0) load[best] += std::log(std::max(spectrum[k], least) / least) / share;
    }
  }
  return columns;
}

// Turns the columns that are the same dimension of the sub-vectors of a table among themselves, so
// that the mean of the keys is the same in all of them: a table then carries it as if it had one
// sub-vector alone. Their eigenvalues are neighbours, so turning them costs little.
void share_means(Matrix& rotation, const std::vector<double>& mean, int64_t n_subvectors,
                 int64_t n_tables) {
  const int64_t dims = rotation.rows(), sub_dim = dims / n_subvectors;
  std::vector<int64_t> columns;
  std::vector<double> from, to;
  for (int64_t first = 0; first < n_tables * sub_dim; ++first) {
    columns.clear();
    for (int64_t j = first; j < dims; j += n_tables * sub_dim) columns.push_back(j);
    const double even = 1.0 / std::sqrt(static_cast<double>(columns.size()));
    from.assign(columns.size(), 0.0);
    double square = 0, sum = 0;
    for (size_t c = 0; c < columns.size(); ++c) {
      for (int64_t i = 0; i < dims; ++i) from[c] += mean[i] * rotation(i, columns[c]);
      square += from[c] * from[c];
      sum += from[c];
    }
    if (columns.size() == 1 || square == 0.0) continue;
    // The rotation of the plane of a = from / |from| and b = (+-1, ...) / sqrt(n) that takes a to
    // b: x -> x - (a + b) (x . (a + b)) / (1 + a . b) + 2 b (x . a).
    to.assign(columns.size(), sum < 0.0 ? -even : even);
    double cosine = 0;
    for (size_t c = 0; c < columns.size(); ++c) cosine += (from[c] /= std::sqrt(square)) * to[c];
    for (int64_t i = 0; i < dims; ++i) {
      double along_a = 0, along_b = 0;
      for (size_t c = 0; c < columns.size(); ++c) {
        along_a += rotation(i, columns[c]) * from[c];
        along_b += rotation(i, columns[c]) * to[c];
      }
      const double both = (along_a + along_b) / (1.0 + cosine);
      for (size_t c = 0; c < columns.size(); ++c) {
        rotation(i, columns[c]) += 2.0 * along_a * to[c] - both * (from[c] + to[c]);
      }
    }
  }
}

}  // namespace

void learned_rotation(const TensorView& x, const TensorView& query_moments, int n_subvectors,
                      int n_tables, const MutableTensorView& rotation,
                      const MutableTensorView& weight, const TensorView& token_weights) {
  require_float_rows(x, "learned_rotation");
  require_token_weights(token_weights, x, "learned_rotation");
  const int64_t heads = x.shape[0], dims = x.shape[2];
  require(n_subvectors >= 1 && dims % n_subvectors == 0, "[learned_rotation] n_subvectors: got ",
          n_subvectors, ", wanted a divisor of head_dim = ", dims);
  require(n_tables >= 1 && n_tables <= n_subvectors, "[learned_rotation] n_tables: got ", n_tables,
          ", wanted 1 to n_subvectors = ", n_subvectors);
  if (!query_moments.empty()) {
    require_float32(query_moments, "query_moments", {heads, dims}, "learned_rotation");
  }
  require_float32(read_only(rotation), "rotation", {heads, dims, dims}, "learned_rotation");
  require_float32(read_only(weight), "weight", {heads, dims}, "learned_rotation");

  parallel_for(heads, [&](long h) {
    const std::vector<float> w = query_weight(query_moments, h, dims);
    auto [metric, mean] = moments_of(x, token_weights, h);
    for (int64_t i = 0; i < dims; ++i) {
      for (int64_t j = 0; j < dims; ++j) metric(i, j) *= static_cast<double>(w[i]) * w[j];
      mean[i] *= w[i];
    }
    const veloxquant_eigen::SelfAdjointEigenSolver<Matrix> solver(metric);
    require(solver.info() == veloxquant_eigen::Success,
            "[learned_rotation] x: the eigen-decomposition of head ", h, " did not converge");
    const auto& values = solver.eigenvalues();
    const std::vector<int64_t> columns =
        balanced_columns({values.data(), values.data() + dims}, n_subvectors, n_tables);
    Matrix learned(dims, dims);
    for (int64_t j = 0; j < dims; ++j) {
      const auto vector = solver.eigenvectors().col(columns[j]);
      // The sign of an eigenvector is arbitrary: its largest entry is made positive.
      int64_t largest = 0;
      for (int64_t i = 1; i < dims; ++i) {
        if (std::abs(vector(i)) > std::abs(vector(largest))) largest = i;
      }
      const double sign = vector(largest) < 0.0 ? -1.0 : 1.0;
      learned.col(j) = sign * vector;
    }
    share_means(learned, mean, n_subvectors, n_tables);
    for (int64_t i = 0; i < dims; ++i) {
      for (int64_t j = 0; j < dims; ++j) {
        element(rotation, h, i, j) = static_cast<float>(learned(i, j));
      }
      *static_cast<float*>(weight.at(h, i)) = w[i];
    }
  });
}

void rotation_matrices(const TensorView& rotation, const TensorView& weight,
                       const MutableTensorView& encode_matrix,
                       const MutableTensorView& query_matrix) {
  require(!rotation.empty() && rotation.ndim == 3 && rotation.shape[1] == rotation.shape[2],
          "[rotation_matrices] rotation: got ", rotation.ndim, " dimensions, wanted [H, D, D]");
  const int64_t heads = rotation.shape[0], dims = rotation.shape[1];
  require_float32(rotation, "rotation", {heads, dims, dims}, "rotation_matrices");
  require_float32(weight, "weight", {heads, dims}, "rotation_matrices");
  require_float32(read_only(encode_matrix), "encode_matrix", {heads, dims, dims},
                  "rotation_matrices");
  require_float32(read_only(query_matrix), "query_matrix", {heads, dims, dims},
                  "rotation_matrices");
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < dims; ++i) {
      const float w = *static_cast<const float*>(weight.at(h, i));
      require(std::isfinite(w) && w > 0.0f, "[rotation_matrices] weight: got ", w,
              ", wanted finite positive weights");
      for (int64_t j = 0; j < dims; ++j) {
        const float u = *static_cast<const float*>(rotation.at(h, i, j));
        require(std::isfinite(u), "[rotation_matrices] rotation: got ", u, ", wanted finite");
        element(encode_matrix, h, i, j) = w * u;
        element(query_matrix, h, i, j) = u / w;
      }
    }
  }
}

}  // namespace veloxquant
