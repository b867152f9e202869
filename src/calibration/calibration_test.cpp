// Distortion against the known figures, determinism, and the corners: fewer vectors than
// centroids, equal vectors, empty clusters, dead channels, values that are not finite.
#include "veloxquant/calibration.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "src/calibration/lloyd.h"
#include "src/calibration/random.h"
#include "src/math/float16.h"
#include "veloxquant/backend.h"
#include "veloxquant/cuda.h"

namespace veloxquant {
namespace {

using testing::HasSubstr;

std::vector<float> gaussian(int64_t n, uint64_t seed) {
  SplitMix64 random(seed, 0);
  std::vector<float> x(n);
  for (float& v : x) {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - random.uniform()));
    v = static_cast<float>(radius * std::cos(6.283185307179586 * random.uniform()));
  }
  return x;
}

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

template <class Call>
void expect_error(const Call& call, const char* message) {
  try {
    call();
    ADD_FAILURE() << "no error, wanted one with " << message;
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr(message));
  }
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

// ---------------------------------------------------------------------------------- tables

struct Tables {
  Tables(int64_t heads, int64_t per, int64_t c, int64_t d) : bits(heads * per * c * d) {
    view = MutableTensorView(bits.data(), DType::float16, {heads, per, c, d});
  }
  std::vector<uint16_t> bits;
  MutableTensorView view;
};

// Keys with a few loud channels, as after RoPE: [H][N][D].
std::vector<float> keys(int64_t heads, int64_t n, int64_t dims, uint64_t seed) {
  auto x = gaussian(heads * n * dims, seed);
  for (size_t i = 0; i < x.size(); ++i) {
    if (i % dims % 16 == 3) x[i] = 8.0f * x[i] + 20.0f;
  }
  return x;
}

class TrainTables : public testing::TestWithParam<int> {
 protected:
  static constexpr int kHeads = 3, kTokens = 1500, kDims = 64, kSubvectors = 16;

  std::vector<uint16_t> train(TableReport* report = nullptr) {
    std::vector<float> lambda(kHeads * kDims);
    const TensorView x(x_.data(), DType::float32, {kHeads, kTokens, kDims});
    const MutableTensorView scale(lambda.data(), DType::float32, {kHeads, kDims});
    smooth_factors(x, scale);
    Tables tables(kHeads, GetParam(), 64, kDims / kSubvectors);
    Transform transform;
    transform.kind = TransformKind::hadamard;
    transform.scale = read_only(scale);
    KMeansParams params;
    params.n_centroids = 64;
    params.max_iterations = 8;
    const TableReport got =
        train_vecinfer_tables(x, transform, kSubvectors, GetParam(), params, tables.view);
    if (report != nullptr) *report = got;
    return tables.bits;
  }

  // A table for each sub-vector, as codecs take them.
  static std::vector<uint16_t> expanded(const std::vector<uint16_t>& tables) {
    const size_t size = 64 * kDims / kSubvectors, per = GetParam();
    std::vector<uint16_t> all;
    for (size_t h = 0; h < kHeads; ++h) {
      for (size_t m = 0; m < kSubvectors; ++m) {
        const auto from = tables.begin() + (h * per + m % per) * size;
        all.insert(all.end(), from, from + size);
      }
    }
    return all;
  }

  std::vector<float> x_ = keys(kHeads, kTokens, kDims, 9);
};

TEST_P(TrainTables, SameBitsWithAnyNumberOfThreads) {
  std::vector<std::vector<uint16_t>> results;
  for (int threads : {1, 2}) {
    set_num_threads(threads);
    results.push_back(train());
  }
  set_num_threads(0);
  EXPECT_EQ(results[0], results[1]);
}

TEST_P(TrainTables, SameBitsOnEverySimdLevel) {
  set_default_backend(Backend::reference);
  const auto wanted = train();
  set_default_backend(Backend::cpu);
  for (const std::string& level : simd_levels()) {
    set_simd_level(level);
    EXPECT_EQ(train(), wanted) << level;
  }
  set_simd_level("");
}

TEST_P(TrainTables, ReportIsTheErrorOfTheCodec) {
  TableReport report;
  const std::vector<uint16_t> bits = expanded(train(&report));
  std::vector<float> lambda(kHeads * kDims);
  const MutableTensorView scale(lambda.data(), DType::float32, {kHeads, kDims});
  smooth_factors(TensorView(x_.data(), DType::float32, {kHeads, kTokens, kDims}), scale);
  Transform transform;
  transform.kind = TransformKind::hadamard;
  transform.scale = read_only(scale);
  const CodecPtr codec = make_vecinfer_codec(
      Side::keys, kHeads, kDims, kSubvectors,
      TensorView(bits.data(), DType::float16, {kHeads, kSubvectors, 64, kDims / kSubvectors}),
      transform);
  for (int h = 0; h < kHeads; ++h) {
    double error = 0, energy = 0;
    std::vector<uint8_t> block(codec->block_bytes());
    for (int t = 0; t < kTokens; ++t) {
      std::vector<float> row(x_.begin() + (h * kTokens + t) * kDims,
                             x_.begin() + (h * kTokens + t + 1) * kDims);
      std::vector<float> decoded(kDims);
      codec->encode_block(Backend::cpu, {0, h, 0}, row.data(), 1, block.data());
      codec->decode_block(Backend::cpu, {0, h, 0}, block.data(), 1, decoded.data(), kDims);
      codec->forward(h, row.data(), 1);
      for (int i = 0; i < kDims; ++i) {
        error += (row[i] - decoded[i]) * (row[i] - decoded[i]);
        energy += row[i] * row[i];
      }
    }
    EXPECT_NEAR(report.relative_error[h], error / energy, 1e-5) << "head " << h;
    EXPECT_LT(report.relative_error[h], 0.25);
  }
}

INSTANTIATE_TEST_SUITE_P(Shared, TrainTables, testing::Values(1, 4, 8, 16));

TEST(Tables, StridedHalfInputAndProgress) {
  const int64_t heads = 2, n = 300, dims = 16;
  const auto x = gaussian(heads * n * dims, 4);
  // The same numbers as [N][H][D] in bf16, read as [H, N, D].
  std::vector<uint16_t> shuffled(x.size());
  std::vector<float> rounded(x.size());
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t i = 0; i < dims; ++i) {
        const uint16_t value = f32_to_bf16(x[(h * n + t) * dims + i]);
        shuffled[(t * heads + h) * dims + i] = value;
        rounded[(h * n + t) * dims + i] = bf16_to_f32(value);
      }
    }
  }
  TensorView view(shuffled.data(), DType::bfloat16, {heads, n, dims});
  view.stride = {dims, heads * dims, 1};
  KMeansParams params;
  params.n_centroids = 16;
  Tables a(heads, 4, 16, 4), b(heads, 4, 16, 4);
  std::vector<double> fractions;
  set_num_threads(1);
  train_vecinfer_tables(view, {}, 4, 4, params, a.view);
  set_num_threads(0);
  train_vecinfer_tables(TensorView(rounded.data(), DType::float32, {heads, n, dims}), {}, 4, 4,
                        params, b.view, [&](double fraction) { fractions.push_back(fraction); });
  EXPECT_EQ(a.bits, b.bits);
  EXPECT_EQ(fractions.size(), 8u);
  EXPECT_TRUE(std::is_sorted(fractions.begin(), fractions.end()));  // whichever thread is first
  EXPECT_EQ(fractions.back(), 1.0);
}

TEST(Tables, TokensThatAreNotFiniteAreLeftOut) {
  const int64_t n = 200, dims = 8;
  auto x = gaussian(n * dims, 4);
  KMeansParams params;
  params.n_centroids = 4;
  Tables clean(1, 2, 4, 4), dirty(1, 2, 4, 4);
  std::vector<float> without(x.begin() + dims, x.end());
  x[3] = NAN;
  train_vecinfer_tables(TensorView(x.data(), DType::float32, {1, n, dims}), {}, 2, 2, params,
                        dirty.view);
  train_vecinfer_tables(TensorView(without.data(), DType::float32, {1, n - 1, dims}), {}, 2, 2,
                        params, clean.view);
  EXPECT_EQ(clean.bits, dirty.bits);
  std::fill(x.begin(), x.end(), INFINITY);
  expect_error(
      [&] {
        train_vecinfer_tables(TensorView(x.data(), DType::float32, {1, n, dims}), {}, 2, 2, params,
                              dirty.view);
      },
      "no token of head 0 is finite");
}

TEST(Tables, LargeCentroidsStayFiniteInHalf) {
  const std::vector<float> x(100 * 8, 1e6f);
  Tables tables(1, 2, 2, 4);
  KMeansParams params;
  params.n_centroids = 2;
  train_vecinfer_tables(TensorView(x.data(), DType::float32, {1, 100, 8}), {}, 2, 2, params,
                        tables.view);
  for (uint16_t half : tables.bits) EXPECT_EQ(f16_to_f32(half), 65504.0f);
  train_vecinfer_tables(TensorView(x.data(), DType::float32, {1, 100, 8}), {}, 2, 2, params,
                        tables.view, {}, TableEntries::int8);
  for (uint16_t half : tables.bits) EXPECT_EQ(f16_to_f32(half), 127 * 512.0f);
}

// The report is that of the rounded entries, and GPUs take the tables as they are.
TEST(Tables, Int8EntriesAreTheFormatAndCostLittle) {
  const int64_t n = 4096, dims = 16;
  const auto x = gaussian(n * dims, 11);
  const TensorView view(x.data(), DType::float32, {1, n, dims});
  KMeansParams params;
  params.n_centroids = 64;
  for (int n_tables : {4, 2, 1}) {
    Tables fp16(1, n_tables, 64, 4), int8(1, n_tables, 64, 4);
    const double before =
        train_vecinfer_tables(view, {}, 4, n_tables, params, fp16.view).relative_error[0];
    const double after =
        train_vecinfer_tables(view, {}, 4, n_tables, params, int8.view, {}, TableEntries::int8)
            .relative_error[0];
    EXPECT_NE(int8.bits, fp16.bits);
    EXPECT_NE(after, before);
    EXPECT_LT(std::abs(after - before), 0.01 * before);
    EXPECT_EQ(cuda::round_tables_to_int8(int8.view), 0.0);  // nothing is left to round
  }
}

// Sub-vector m trains table m % n alone, on what kmeans() would make of its sub-vectors together;
// repeated for each sub-vector the tables are looked up by lane.
TEST(Tables, ByLaneEachTableSeesItsSubvectorsAndGpusFindThem) {
  const int64_t n = 600, dims = 64;
  const int subvectors = 16;
  const auto x = gaussian(n * dims, 12);
  std::vector<float> weights(n);
  for (int64_t t = 0; t < n; ++t) weights[t] = 0.5f + static_cast<float>(t % 5);
  KMeansParams params;
  params.n_centroids = 256;
  params.max_iterations = 5;
  for (Side side : {Side::keys, Side::values}) {
    const int lanes = cuda::lane_tables(side), share = subvectors / lanes;
    Tables tables(1, lanes, 256, 4), all(1, subvectors, 256, 4);
    train_vecinfer_tables(TensorView(x.data(), DType::float32, {1, n, dims}), {}, subvectors, lanes,
                          params, tables.view, {}, TableEntries::int8,
                          TensorView(weights.data(), DType::float32, {1, n}));
    for (int m = 0; m < subvectors; ++m) {
      std::copy_n(tables.bits.begin() + m % lanes * 1024, 1024, all.bits.begin() + m * 1024);
    }
    const cuda::PreparedSide prepared =
        cuda::prepare_side(side, 1, dims, subvectors, read_only(all.view), {});
    EXPECT_EQ(prepared.format.lookup, cuda::Lookup::by_lane);
    for (int c = 0; c < lanes; ++c) {
      std::vector<float> own(4 * share * n), counts(share * n);
      for (int64_t k = 0; k < share * n; ++k) {
        const int64_t m = c + lanes * (k / n), t = k % n;
        for (int i = 0; i < 4; ++i) own[i * share * n + k] = x[t * dims + m * 4 + i];
        counts[k] = weights[t];
      }
      KMeansParams seeded = params;
      seeded.seed = SplitMix64(params.seed, c).next();
      std::vector<float> wanted =
          kmeans(own.data(), share * n, share * n, 4, seeded, counts.data()).centroids;
      std::vector<uint16_t> halves(1024);
      for (int i = 0; i < 1024; ++i) halves[i] = f32_to_f16(wanted[i]);
      cuda::round_tables_to_int8(MutableTensorView(halves.data(), DType::float16, {256, 4}));
      EXPECT_TRUE(std::equal(halves.begin(), halves.end(), tables.bits.begin() + c * 1024)) << c;
    }
  }
}

TEST(Tables, MoreTokensThanTheLimitAreSubsampled) {
  const int64_t n = 3 * kMaxTrainingVectors + 17, dims = 8;
  const auto x = gaussian(n * dims, 8);
  KMeansParams params;
  params.n_centroids = 4;
  const double wanted = kmeans(x.data(), n * 2, n * 2, 4, params).mse_per_dim;
  for (int n_tables : {2, 1}) {
    Tables tables(1, n_tables, 4, 4);
    const auto report = train_vecinfer_tables(TensorView(x.data(), DType::float32, {1, n, dims}),
                                              {}, 2, n_tables, params, tables.view);
    EXPECT_NEAR(report.relative_error[0], wanted, 0.01);
  }
}

TEST(Tables, BadArgumentsAreErrors) {
  const std::vector<float> x(2 * 10 * 16, 1.0f);
  const TensorView view(x.data(), DType::float32, {2, 10, 16});
  Tables tables(2, 4, 16, 4);
  KMeansParams params;
  params.n_centroids = 16;
  const auto run = [&](const TensorView& input, int subvectors, int n_tables,
                       const MutableTensorView& out, const Transform& transform = {}) {
    return [=] { train_vecinfer_tables(input, transform, subvectors, n_tables, params, out); };
  };
  expect_error(run({}, 4, 4, tables.view), "wanted [H, N, D]");
  expect_error(run(TensorView(x.data(), DType::int32, {2, 10, 16}), 4, 4, tables.view),
               "x: got int32");
  expect_error(run(TensorView(x.data(), DType::float32, {2, 0, 16}), 4, 4, tables.view),
               "N, D >= 1");
  expect_error(run(view, 5, 4, tables.view), "n_subvectors: got 5");
  expect_error(run(view, 0, 4, tables.view), "n_subvectors: got 0");
  expect_error(run(view, 4, 0, tables.view), "n_tables: got 0, wanted 1 to n_subvectors = 4");
  expect_error(run(view, 4, 5, tables.view), "n_tables: got 5");
  expect_error(run(view, 4, 1, tables.view), "wanted float16 [2, 1, 16, 4]");
  expect_error(run(view, 4, 4, {}), "tables: got");
  Transform no_matrix;
  no_matrix.kind = TransformKind::dense;
  expect_error(run(view, 4, 4, tables.view, no_matrix), "encode_matrix");
  params.n_centroids = 4097;
  Tables large(2, 4, 4097, 4);
  expect_error(run(view, 4, 4, large.view), "n_centroids: got 4097");
}

// --------------------------------------------------------------------------- smooth factors

std::vector<float> factors(const TensorView& x, float floor = 1e-4f) {
  std::vector<float> lambda(x.shape[0] * x.shape[2]);
  smooth_factors(x, MutableTensorView(lambda.data(), DType::float32, {x.shape[0], x.shape[2]}),
                 floor);
  return lambda;
}

TEST(SmoothFactors, AreRootsOfTheLargestMagnitudes) {
  const std::vector<float> x = {1, -4, 9, -16, 2, 3,    // head 0: 3 tokens of 2
                                0, 0,  0, 25,  0, -1};  // head 1
  EXPECT_THAT(factors(TensorView(x.data(), DType::float32, {2, 3, 2})),
              testing::ElementsAre(3, 4, std::sqrt(1e-4f * 25), 5));
}

TEST(SmoothFactors, DeadChannelsHeadsAndValuesThatAreNotFinite) {
  const std::vector<float> x = {NAN, 4, INFINITY, 1, -INFINITY, 9};
  EXPECT_THAT(factors(TensorView(x.data(), DType::float32, {1, 3, 2}), 0.25f),
              testing::ElementsAre(1.5f, 3));
  const std::vector<float> zeros(8, 0.0f);
  for (float v : factors(TensorView(zeros.data(), DType::float32, {2, 2, 2}))) {
    EXPECT_EQ(v, std::sqrt(1e-8f));
  }
}

TEST(SmoothFactors, StridesAndHalfPrecision) {
  const auto x = gaussian(3 * 40 * 8, 2);
  for (DType dtype : {DType::float16, DType::bfloat16}) {
    std::vector<uint16_t> bits(x.size());
    std::vector<float> rounded(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      bits[i] = dtype == DType::float16 ? f32_to_f16(x[i]) : f32_to_bf16(x[i]);
      rounded[i] = dtype == DType::float16 ? f16_to_f32(bits[i]) : bf16_to_f32(bits[i]);
    }
    EXPECT_EQ(factors(TensorView(bits.data(), dtype, {3, 40, 8})),
              factors(TensorView(rounded.data(), DType::float32, {3, 40, 8})));
  }
  // [D][N][H] in memory, tokens backwards; lambda transposed as well.
  std::vector<float> turned(x.size());
  for (int h = 0; h < 3; ++h) {
    for (int t = 0; t < 40; ++t) {
      for (int i = 0; i < 8; ++i) turned[(i * 40 + 39 - t) * 3 + h] = x[(h * 40 + t) * 8 + i];
    }
  }
  TensorView view(turned.data() + 39 * 3, DType::float32, {3, 40, 8});
  view.stride = {1, -3, 120};
  EXPECT_EQ(factors(view), factors(TensorView(x.data(), DType::float32, {3, 40, 8})));
  std::vector<float> transposed(24);
  MutableTensorView lambda(transposed.data(), DType::float32, {3, 8});
  lambda.stride = {1, 3};
  smooth_factors(view, lambda);
  for (int h = 0; h < 3; ++h) {
    for (int i = 0; i < 8; ++i) EXPECT_EQ(transposed[i * 3 + h], factors(view)[h * 8 + i]);
  }
}

TEST(SmoothFactors, BadArgumentsAreErrors) {
  std::vector<float> x(24, 1.0f), out(8);
  const TensorView view(x.data(), DType::float32, {2, 3, 4});
  const MutableTensorView lambda(out.data(), DType::float32, {2, 4});
  expect_error([&] { smooth_factors({}, lambda); }, "wanted [H, N, D]");
  expect_error([&] { smooth_factors(view, {}); }, "lambda: got");
  expect_error(
      [&] {
        smooth_factors(view, MutableTensorView(out.data(), DType::float32, {4, 2}));
      },
      "wanted float32 [2, 4]");
  expect_error(
      [&] {
        smooth_factors(view, MutableTensorView(out.data(), DType::float16, {2, 4}));
      },
      "lambda: got float16");
  expect_error([&] { smooth_factors(view, lambda, NAN); }, "floor");
  expect_error([&] { smooth_factors(view, lambda, 2.0f); }, "floor");
}

}  // namespace
}  // namespace veloxquant
