// Distortion against the known figures, determinism, and the corners: fewer vectors than
// centroids, equal vectors, empty clusters, weights.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "src/calibration/calibration_fixture.h"
#include "src/calibration/lloyd.h"
#include "veloxquant/backend.h"
#include "veloxquant/calibration.h"

namespace veloxquant {
namespace {

double error_per_dim(const std::vector<float>& x, int64_t n, int d,
                     const std::vector<float>& table) {
  std::vector<uint16_t> codes(n);
  std::vector<float> distance(n);
  nearest_centroids(default_backend(), x.data(), n, n, table.data(),
                    static_cast<int>(table.size()) / d, d, codes.data(), distance.data());
  double sum = 0;
  for (float v : distance) sum += v;
  return sum / (static_cast<double>(n) * d);
}

// spec/ALGORITHMS.md 1.6, held-out error per dimension of N(0, 1).
TEST(KMeans, ReachesTheKnownDistortionOfGaussians) {
  const int64_t n = 65536;
  for (const auto& [d, wanted] : {std::pair{4, 0.098}, {8, 0.323}}) {
    const auto train = gaussian(n * d, 1), held_out = gaussian(n * d, 2);
    const KMeansResult result = kmeans(train.data(), n, n, d, {});
    const double error = error_per_dim(held_out, n, d, result.centroids);
    RecordProperty("d" + std::to_string(d), std::to_string(error));
    std::printf("d%d: train %.4f, held out %.4f, %d iterations\n", d, result.mse_per_dim, error,
                result.iterations);
    EXPECT_NEAR(error, wanted, d == 4 ? 0.002 : 0.004);
    EXPECT_LT(result.mse_per_dim, error);
  }
}

TEST(KMeans, RecoversSeparateClusters) {
  const int n = 3000, clusters = 12;
  const auto noise = gaussian(2 * n, 3);
  std::vector<float> x(2 * n);
  for (int t = 0; t < n; ++t) {
    x[t] = 10.0f * static_cast<float>(t % clusters % 4) + 0.1f * noise[t];
    x[n + t] = 10.0f * static_cast<float>(t % clusters / 4) + 0.1f * noise[n + t];
  }
  KMeansParams params;
  params.n_centroids = clusters;
  const KMeansResult result = kmeans(x.data(), n, n, 2, params);
  std::set<std::pair<int, int>> found;
  for (int c = 0; c < clusters; ++c) {
    const float a = result.centroids[2 * c] / 10, b = result.centroids[2 * c + 1] / 10;
    EXPECT_NEAR(a, std::round(a), 0.005);
    EXPECT_NEAR(b, std::round(b), 0.005);
    found.insert({static_cast<int>(std::round(a)), static_cast<int>(std::round(b))});
  }
  EXPECT_EQ(found.size(), static_cast<size_t>(clusters));
  EXPECT_NEAR(result.mse_per_dim, 0.01, 0.001);
}

TEST(KMeans, FewerVectorsThanCentroidsRepeatsVectors) {
  const std::vector<float> x = {1, 2, 3, 10, 20, 30};  // [2][3]
  KMeansParams params;
  params.n_centroids = 16;
  const KMeansResult result = kmeans(x.data(), 3, 3, 2, params);
  EXPECT_EQ(result.mse_per_dim, 0.0);
  std::set<float> firsts;
  for (int c = 0; c < 16; ++c) {
    EXPECT_EQ(result.centroids[2 * c + 1], 10 * result.centroids[2 * c]);
    firsts.insert(result.centroids[2 * c]);
  }
  EXPECT_EQ(firsts, (std::set<float>{1, 2, 3}));
}

TEST(KMeans, EqualVectorsGiveThatVector) {
  const std::vector<float> x(4 * 1000, 0.7f);
  const KMeansResult result = kmeans(x.data(), 1000, 1000, 4, {});
  EXPECT_EQ(result.mse_per_dim, 0.0);
  EXPECT_EQ(result.iterations, 0);
  for (float v : result.centroids) EXPECT_EQ(v, 0.7f);
}

TEST(KMeans, ColumnsBeyondNAreNotRead) {
  std::vector<float> x(4 * 100, NAN);
  const auto values = gaussian(4 * 60, 5);
  for (int i = 0; i < 4; ++i) std::copy_n(values.data() + 60 * i, 60, x.data() + 100 * i);
  KMeansParams params;
  params.n_centroids = 8;
  EXPECT_EQ(kmeans(x.data(), 100, 60, 4, params).centroids,
            kmeans(values.data(), 60, 60, 4, params).centroids);
}

TEST(KMeans, SeedsDifferAndRepeat) {
  const auto x = gaussian(4 * 500, 6);
  KMeansParams params;
  params.n_centroids = 16;
  const auto once = kmeans(x.data(), 500, 500, 4, params).centroids;
  EXPECT_EQ(once, kmeans(x.data(), 500, 500, 4, params).centroids);
  params.seed = 1;
  EXPECT_NE(once, kmeans(x.data(), 500, 500, 4, params).centroids);
}

// 1,024 vectors, scaled and shifted per dimension: what an adaptive cache fits its tables on.
TEST(KMeans, NormalStartLosesLessOnOtherVectors) {
  const float scale[] = {3.0f, 0.5f, 20.0f, 1.0f}, shift[] = {1.0f, -2.0f, 0.0f, 5.0f};
  auto scaled = [&](int64_t n, uint64_t seed) {
    std::vector<float> x = gaussian(4 * n, seed);
    for (int i = 0; i < 4; ++i) {
      for (int64_t t = 0; t < n; ++t) x[i * n + t] = shift[i] + scale[i] * x[i * n + t];
    }
    return x;
  };
  const std::vector<float> x = scaled(1024, 9), other = scaled(8192, 10);
  auto held_out = [&](const KMeansParams& params) {
    const KMeansResult result = kmeans(x.data(), 1024, 1024, 4, params);
    std::vector<uint16_t> codes(8192);
    std::vector<float> distance(8192);
    nearest_centroids(Backend::reference, other.data(), 8192, 8192, result.centroids.data(), 256, 4,
                      codes.data(), distance.data());
    return std::accumulate(distance.begin(), distance.end(), 0.0);
  };
  KMeansParams normal;
  normal.start = KMeansStart::normal;
  normal.max_iterations = 6;
  EXPECT_LT(held_out(normal), 0.96 * held_out({}));
}

TEST(KMeans, NormalStartOnDegenerateVectors) {
  KMeansParams params;
  params.start = KMeansStart::normal;
  const std::vector<float> same(4 * 100, 0.7f);
  EXPECT_LT(kmeans(same.data(), 100, 100, 4, params).mse_per_dim, 1e-12);
  for (int64_t n : {1, 3}) {
    const std::vector<float> few = gaussian(4 * n, 11);
    for (float v : kmeans(few.data(), n, n, 4, params).centroids) EXPECT_TRUE(std::isfinite(v));
  }
}

TEST(KMeans, SeedingDrawsByDistance) {
  // 999 vectors near 0 and one at 100: whatever the first draw is, the second is the other kind.
  std::vector<float> x(1000, 0.0f);
  for (int t = 0; t < 1000; ++t) x[t] = 1e-3f * static_cast<float>(t % 7);
  x[613] = 100.0f;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const auto centroids = seed_centroids({x.data(), 1000, 1000, 1}, 2, seed);
    EXPECT_EQ((centroids[0] == 100.0f) + (centroids[1] == 100.0f), 1) << seed;
  }
}

TEST(Lloyd, EmptyClustersGetTheFarthestVectors) {
  // Everything is nearest to centroid 0; 1 and 2 start where nothing is.
  const std::vector<float> x = {0, 0, 0, 0, 5, 9};
  KMeansParams params;
  params.n_centroids = 3;
  int reseeded = 0;
  const KMeansResult result = lloyd({x.data(), 6, 6, 1}, {0, 1000, 2000}, params, &reseeded);
  EXPECT_EQ(reseeded, 2);
  EXPECT_THAT(result.centroids, testing::ElementsAre(0, 9, 5));
  EXPECT_EQ(result.mse_per_dim, 0.0);
}

TEST(Lloyd, ReseedingNeverEmptiesAnotherCluster) {
  // The vector that is farthest from its centroid is alone in its cluster.
  const std::vector<float> x = {0, 0.5f, 1, 50};
  KMeansParams params;
  params.n_centroids = 3;
  params.max_iterations = 1;
  int reseeded = 0;
  const KMeansResult result = lloyd({x.data(), 4, 4, 1}, {0.5f, 40, 2000}, params, &reseeded);
  EXPECT_EQ(reseeded, 1);
  EXPECT_EQ(result.centroids[1], 50.0f);
  EXPECT_EQ(result.centroids[2], 0.0f) << "the first of the next farthest";
}

// Lloyd as plain loops in double, from the same start.
std::vector<double> plain_lloyd(const std::vector<float>& x, const std::vector<float>& weights,
                                int64_t n, int d, const std::vector<float>& start, int iterations) {
  std::vector<double> centroids(start.begin(), start.end());
  const size_t count = start.size() / d;
  for (int round = 0; round < iterations; ++round) {
    std::vector<double> sums(start.size(), 0.0), masses(count, 0.0);
    for (int64_t t = 0; t < n; ++t) {
      size_t nearest = 0;
      double least = INFINITY;
      for (size_t c = 0; c < count; ++c) {
        double distance = 0;
        for (int i = 0; i < d; ++i) {
          const double difference = x[i * n + t] - centroids[c * d + i];
          distance += difference * difference;
        }
        if (distance < least) least = distance, nearest = c;
      }
      masses[nearest] += weights[t];
      for (int i = 0; i < d; ++i) sums[nearest * d + i] += double{weights[t]} * x[i * n + t];
    }
    for (size_t i = 0; i < sums.size(); ++i) centroids[i] = sums[i] / masses[i / d];
  }
  return centroids;
}

TEST(Lloyd, WeightedMeansAreThoseOfPlainLoops) {
  const int64_t n = 2000;
  const auto x = gaussian(3 * n, 31);
  std::vector<float> weights(n);
  for (int64_t t = 0; t < n; ++t) weights[t] = 0.1f + static_cast<float>(t % 9);
  const Vectors vectors{x.data(), n, n, 3, weights.data()};
  const std::vector<float> start = seed_centroids(vectors, 12, 5);
  KMeansParams params;
  params.n_centroids = 12;
  params.max_iterations = 6;
  params.tolerance = 0.0;
  int reseeded = 0;
  const KMeansResult got = lloyd(vectors, start, params, &reseeded);
  const std::vector<double> wanted = plain_lloyd(x, weights, n, 3, start, 6);
  ASSERT_EQ(reseeded, 0);
  for (size_t i = 0; i < wanted.size(); ++i) EXPECT_NEAR(got.centroids[i], wanted[i], 1e-5);
  params.seed = 5;
  EXPECT_EQ(kmeans(x.data(), n, n, 3, params, weights.data()).centroids, got.centroids);
}

TEST(KMeans, EqualWeightsChangeNothingAndALargeOneDrawsACentroid) {
  const int64_t n = 1000;
  auto x = gaussian(4 * n, 32);
  std::vector<float> weights(n, 2.0f);
  KMeansParams params;
  params.n_centroids = 16;
  params.start = KMeansStart::normal;
  const auto wanted = kmeans(x.data(), n, n, 4, params).centroids;
  const auto got = kmeans(x.data(), n, n, 4, params, weights.data()).centroids;
  for (size_t i = 0; i < wanted.size(); ++i) EXPECT_NEAR(got[i], wanted[i], 1e-6f);
  weights[77] = 1e5f;
  params.start = KMeansStart::plus_plus;
  const auto drawn = kmeans(x.data(), n, n, 4, params, weights.data()).centroids;
  double nearest = INFINITY;
  for (int c = 0; c < 16; ++c) {
    double distance = 0;
    for (int i = 0; i < 4; ++i) distance += std::pow(drawn[4 * c + i] - x[i * n + 77], 2);
    nearest = std::min(nearest, distance);
  }
  EXPECT_LT(nearest, 1e-4);
}

TEST(KMeans, BadArgumentsAreErrors) {
  std::vector<float> x(40, 1.0f);
  const auto run = [&](int64_t stride, int64_t n, int d, int c, int iterations = 1) {
    KMeansParams params;
    params.n_centroids = c;
    params.max_iterations = iterations;
    return [=, &x] { kmeans(x.data(), stride, n, d, params); };
  };
  expect_error(run(10, 0, 4, 4), "got 0 vectors");
  expect_error(run(9, 10, 4, 4), "stride 9");
  expect_error(run(10, 10, 0, 4), "sub_dim: got 0");
  expect_error(run(1, 1, 65, 4), "sub_dim: got 65");
  expect_error(run(10, 10, 4, 0), "n_centroids: got 0");
  expect_error(run(10, 10, 4, 65537), "n_centroids: got 65537");
  expect_error(run(10, 10, 4, 4, -1), "max_iterations -1");
  std::vector<float> weights(10, 1.0f);
  weights[3] = -1.0f;
  expect_error([&] { kmeans(x.data(), 10, 10, 4, {}, weights.data()); }, "weights: got -1");
  x[17] = NAN;
  expect_error(run(10, 10, 4, 4), "NaN or infinity in dimension 1");
}

}  // namespace
}  // namespace veloxquant
