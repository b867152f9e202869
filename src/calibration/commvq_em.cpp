// One complex number per entry and pair turns the constrained fit into a plain least-squares
// problem: centre (a, b) = z_a + i z_b. Its normal equations are the same for every pair,
//
//   (diag(A + B) + i (S - S^T)) z = M_A - i M_B
//
// with S the joint weights, A and B their sums over b and over a, M_A and M_B the weighted sums of
// the vectors (arXiv 2506.18879, equation of the M step, written in complex numbers).
#include "src/calibration/commvq_em.h"

#include <algorithm>
#include <cmath>

// Before everything that may include Eigen.
#include "src/calibration/eigen.h"
#include "src/codecs/commvq/kernels.h"
#include "veloxquant/backend.h"

namespace veloxquant {
namespace {

using commvq::kMaxEntries;

// e^-u for 0 <= u <= 12, without libm: trained codebooks are the same on every machine.
double exp_of_minus(double u) {
  const double x = u / 256.0;
  double e = 1.0 - x * (1.0 - x / 2.0 * (1.0 - x / 3.0 * (1.0 - x / 4.0)));
  for (int i = 0; i < 8; ++i) e *= e;
  return e;
}

constexpr double kCut = 12.0;

// Adds one vector with its soft assignment. `of_a` and `of_b` (zeros, and left so) collect the
// weights of the factors, since the sums over vectors need no more: few centres have a weight, and
// fewer factors.
class SoftVector {
 public:
  SoftVector(const commvq::Scores& scores, const std::vector<float>& cross, int n_entries)
      : scores_(scores), cross_(cross), n_(n_entries), of_a_(n_entries), of_b_(n_entries) {}

  void add(const float* tile, int pairs, int t, uint16_t nearest, double temperature,
           StageMoments& moments) {
    const int best_a = nearest >> 6;
    const double least = at(scores_.least, best_a, t), reach = least + kCut * temperature;
    candidates_.clear();
    double total = 0.0;
    for (int a = 0; a < n_; ++a) {
      if (!(at(scores_.least, a, t) < reach)) continue;
      const double rest = at(scores_.of_a, a, t);
      for (int b = 0; b < n_; ++b) {
        const double score =
            rest + at(scores_.of_b, b, t) + static_cast<double>(cross_[a * kMaxEntries + b]);
        if (!(score < reach)) continue;
        const double u = std::clamp((score - least) / temperature, 0.0, kCut);
        candidates_.push_back({a, b, score, exp_of_minus(u)});
        total += candidates_.back().weight;
      }
    }
    if (candidates_.empty()) {  // a temperature below the rounding of the scores
      candidates_.push_back({best_a, nearest & 63, least, 1.0});
      total = 1.0;
    }
    double norm = 0.0;
    for (int i = 0; i < 2 * pairs; ++i) {
      const double v = tile[i * kBlockTokens + t];
      norm += v * v;
    }
    moments.nearest_error += norm + least;
    for (const Candidate& c : candidates_) {
      const double weight = c.weight / total;
      moments.joint[c.a * n_ + c.b] += weight;
      moments.error += weight * (norm + c.score);
      of_a_[c.a] += weight;
      of_b_[c.b] += weight;
    }
    for (const Candidate& c : candidates_) {
      spread(tile, pairs, t, of_a_[c.a], moments.as_a.data() + c.a * 2 * pairs);
      spread(tile, pairs, t, of_b_[c.b], moments.as_b.data() + c.b * 2 * pairs);
    }
  }

 private:
  struct Candidate {
    int a, b;
    double score, weight;
  };

  static double at(const float* values, int l, int t) {
    return static_cast<double>(values[l * kBlockTokens + t]);
  }

  // sum += weight * vector, once per factor: the weight is taken.
  static void spread(const float* tile, int pairs, int t, double& weight, double* sum) {
    if (weight == 0.0) return;
    for (int i = 0; i < 2 * pairs; ++i) sum[i] += weight * tile[i * kBlockTokens + t];
    weight = 0.0;
  }

  const commvq::Scores& scores_;
  const std::vector<float>& cross_;
  int n_;
  std::vector<double> of_a_, of_b_;
  std::vector<Candidate> candidates_;
};

void assign_tile(const commvq::StageTables& stage, const std::vector<float>& cross,
                 const float* tile, int count, double temperature, StageMoments& moments) {
  const auto scores = std::make_unique<commvq::Scores>();
  uint16_t codes[kBlockTokens];
  commvq::kernels_of(default_backend()).nearest_tile(stage, tile, codes, scores.get());
  SoftVector vector(*scores, cross, stage.n_entries);
  for (int t = 0; t < count; ++t) {
    vector.add(tile, stage.n_pairs, t, codes[t], temperature, moments);
  }
}

StageMoments no_moments(int n, int pairs) {
  StageMoments moments;
  moments.joint.assign(static_cast<size_t>(n) * n, 0.0);
  moments.as_a.assign(static_cast<size_t>(n) * 2 * pairs, 0.0);
  moments.as_b = moments.as_a;
  return moments;
}

void add(const StageMoments& part, StageMoments& sum) {
  const auto add_all = [](const std::vector<double>& from, std::vector<double>& to) {
    for (size_t i = 0; i < to.size(); ++i) to[i] += from[i];
  };
  add_all(part.joint, sum.joint);
  add_all(part.as_a, sum.as_a);
  add_all(part.as_b, sum.as_b);
  sum.error += part.error;
  sum.nearest_error += part.nearest_error;
}

}  // namespace

double StageVectors::energy() const {
  double sum = 0.0;
  for (int64_t i = 0; i < n_tiles(); ++i) {
    const int64_t here = std::min<int64_t>(64, count - 64 * i);
    for (int d = 0; d < 2 * n_pairs; ++d) {
      for (int64_t t = 0; t < here; ++t) {
        const double v = tile(i)[d * 64 + t];
        sum += v * v;
      }
    }
  }
  return sum;
}

StageMoments soft_assignment(const StageVectors& vectors, const std::vector<float>& entries,
                             int n_entries, double temperature) {
  const int pairs = vectors.n_pairs;
  std::vector<float> norms(kMaxEntries), cross(kMaxEntries * kMaxEntries);
  commvq::kernels_of(default_backend())
      .products(entries.data(), pairs, n_entries, norms.data(), cross.data());
  const commvq::StageTables stage{pairs, n_entries, entries.data(), norms.data(), cross.data()};
  // Chunks depend on the number of vectors alone: the sums do not depend on the threads.
  constexpr int64_t kTiles = 16;
  const int64_t n_chunks = (vectors.n_tiles() + kTiles - 1) / kTiles;
  std::vector<StageMoments> parts(n_chunks, no_moments(n_entries, pairs));
  parallel_for(n_chunks, [&](long chunk) {
    const int64_t end = std::min(vectors.n_tiles(), (chunk + 1) * kTiles);
    for (int64_t i = chunk * kTiles; i < end; ++i) {
      const int count = static_cast<int>(std::min<int64_t>(64, vectors.count - 64 * i));
      assign_tile(stage, cross, vectors.tile(i), count, temperature, parts[chunk]);
    }
  });
  StageMoments sum = no_moments(n_entries, pairs);
  for (const StageMoments& part : parts) add(part, sum);
  return sum;
}

void refit_entries(const StageMoments& moments, int n_pairs, std::vector<float>& entries) {
  const int n = static_cast<int>(entries.size()) / (2 * n_pairs);
  // In real numbers: x above y. The matrix is symmetric since S - S^T is not.
  Matrix normal = Matrix::Zero(2 * n, 2 * n), right(2 * n, n_pairs);
  double total = 0.0;
  for (int a = 0; a < n; ++a) {
    for (int b = 0; b < n; ++b) {
      const double here = moments.joint[a * n + b];
      total += here;
      normal(a, a) += here;
      normal(b, b) += here;
      const double skew = here - moments.joint[b * n + a];
      normal(n + a, b) = skew;
      normal(b, n + a) = skew;
    }
  }
  // Pulls what is assigned nothing to where it was; far below one vector for everything else.
  const double pull = 1e-6 * total / n + 1e-30;
  for (int l = 0; l < n; ++l) {
    normal(l, l) += pull;
    normal(n + l, n + l) = normal(l, l);
    const double* as_a = moments.as_a.data() + l * 2 * n_pairs;
    const double* as_b = moments.as_b.data() + l * 2 * n_pairs;
    const float* entry = entries.data() + l * 2 * n_pairs;
    for (int j = 0; j < n_pairs; ++j) {
      right(l, j) = as_a[j] + as_b[n_pairs + j] + pull * entry[j];
      right(n + l, j) = as_a[n_pairs + j] - as_b[j] + pull * entry[n_pairs + j];
    }
  }
  const Matrix solved = veloxquant_eigen::LLT<Matrix>(normal).solve(right);
  for (int l = 0; l < n; ++l) {
    float* entry = entries.data() + l * 2 * n_pairs;
    for (int j = 0; j < n_pairs; ++j) {
      if (!std::isfinite(solved(l, j)) || !std::isfinite(solved(n + l, j))) continue;
      entry[j] = static_cast<float>(solved(l, j));
      entry[n_pairs + j] = static_cast<float>(solved(n + l, j));
    }
  }
}

double weighted_error(const StageMoments& moments, int n_pairs, double energy,
                      const std::vector<float>& entries) {
  const int n = static_cast<int>(entries.size()) / (2 * n_pairs);
  const float* all = entries.data();
  double error = energy;
  for (int l = 0; l < n; ++l) {
    const float* x = all + l * 2 * n_pairs;
    const double* as_a = moments.as_a.data() + l * 2 * n_pairs;
    const double* as_b = moments.as_b.data() + l * 2 * n_pairs;
    for (int j = 0; j < n_pairs; ++j) {
      const double y = x[n_pairs + j];
      error -= 2.0 * (as_a[j] * x[j] + as_a[n_pairs + j] * y);
      error -= 2.0 * (as_b[n_pairs + j] * x[j] - as_b[j] * y);
    }
  }
  for (int a = 0; a < n; ++a) {
    for (int b = 0; b < n; ++b) {
      const double weight = moments.joint[a * n + b];
      if (weight == 0.0) continue;
      double norm = 0.0;
      for (int j = 0; j < n_pairs; ++j) {
        const double x =
            static_cast<double>(all[a * 2 * n_pairs + j]) - all[b * 2 * n_pairs + n_pairs + j];
        const double y =
            static_cast<double>(all[a * 2 * n_pairs + n_pairs + j]) + all[b * 2 * n_pairs + j];
        norm += x * x + y * y;
      }
      error += weight * norm;
    }
  }
  return error;
}

}  // namespace veloxquant
