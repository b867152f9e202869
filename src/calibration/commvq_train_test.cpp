// Training CommVQ: single EM steps, the whole, and what must not matter.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "src/calibration/commvq_em.h"
#include "src/math/float16.h"
#include "tests/support/random.h"
#include "veloxquant/commvq.h"
#include "veloxquant/error.h"

namespace veloxquant {
namespace {

using test::Random;

// Keys with a mean, channels of unlike size and a few directions, as real ones have.
std::vector<float> keys_of(Random& random, int heads, int n, int dims, const Rope& rope) {
  std::vector<float> keys;
  for (int h = 0; h < heads; ++h) {
    const std::vector<float> mean = random.normal(dims), basis = random.normal(4 * dims);
    std::vector<int64_t> positions(n);
    std::vector<float> rows;
    for (int t = 0; t < n; ++t) {
      positions[t] = t;
      const std::vector<float> noise = random.normal(dims), at = random.normal(4);
      for (int d = 0; d < dims; ++d) {
        float v = 2 * mean[d] + 0.3f * noise[d] / static_cast<float>(1 + d % 7);
        for (int k = 0; k < 4; ++k) v += 0.5f * at[k] * basis[k * dims + d];
        rows.push_back(v);
      }
    }
    rope.turn_rows(Backend::cpu, RopeDirection::forward, positions.data(), n, rows.data(), dims);
    keys.insert(keys.end(), rows.begin(), rows.end());
  }
  return keys;
}

Rope rope_of(int dims) {
  RopeSpec spec;
  spec.head_dim = dims;
  for (int j = 0; j < dims / 2; ++j) {
    spec.inv_freq.push_back(static_cast<float>(std::pow(10000.0, -2.0 * j / dims)));
  }
  return Rope(spec);
}

std::vector<int64_t> counting(int64_t n) {
  std::vector<int64_t> positions(n);
  for (int64_t i = 0; i < n; ++i) positions[i] = i;
  return positions;
}

struct Trained {
  std::vector<uint16_t> book;
  CommVQReport report;
};

Trained train(const std::vector<float>& keys, int heads, int n, int dims, int stages, int entries,
              CommVQParams params = {}, const std::vector<float>& weight = {}) {
  Trained out;
  out.book.resize(static_cast<size_t>(heads) * stages * entries * dims);
  const TensorView w =
      weight.empty() ? TensorView() : TensorView(weight.data(), DType::float32, {heads, dims / 2});
  out.report = train_commvq(
      TensorView(keys.data(), DType::float32, {heads, n, dims}), counting(n), rope_of(dims), w,
      params,
      MutableTensorView(out.book.data(), DType::float16, {heads, stages, entries, 2, dims / 2}));
  return out;
}

StageVectors random_vectors(Random& random, int pairs, int n) {
  StageVectors vectors;
  vectors.n_pairs = pairs;
  vectors.count = n;
  vectors.tiles.assign(vectors.n_tiles() * vectors.tile_size(), 0.0f);
  for (int t = 0; t < n; ++t) {
    for (int i = 0; i < 2 * pairs; ++i) {
      vectors.tile(t / 64)[i * 64 + t % 64] = random.normal() / static_cast<float>(1 + i % 5);
    }
  }
  return vectors;
}

// T7: the M step lowers the weighted error, at every temperature, and a second one changes nothing.
TEST(Step, MStepDecreasesTheWeightedError) {
  Random random(1);
  const int pairs = 8, n_entries = 16;
  const StageVectors vectors = random_vectors(random, pairs, 700);
  const double energy = vectors.energy();
  for (double temperature : {1e-9, 0.01, 0.3, 3.0}) {
    std::vector<float> entries = random.normal(n_entries * 2 * pairs);
    const StageMoments moments = soft_assignment(vectors, entries, n_entries, temperature);
    EXPECT_NEAR(weighted_error(moments, pairs, energy, entries), moments.error,
                1e-5 * moments.error);
    refit_entries(moments, pairs, entries);
    const double after = weighted_error(moments, pairs, energy, entries);
    EXPECT_LT(after, 0.95 * moments.error) << temperature;
    // It is the minimum: no small step away is better.
    for (int trial = 0; trial < 50; ++trial) {
      std::vector<float> moved = entries;
      moved[random.next() % moved.size()] += 0.05f * random.normal();
      EXPECT_GE(weighted_error(moments, pairs, energy, moved), after * (1 - 1e-6));
    }
  }
}

TEST(Step, WeightsAreASoftmaxOverAllCentres) {
  Random random(2);
  const int pairs = 4, n_entries = 8;
  const StageVectors vectors = random_vectors(random, pairs, 40);
  const std::vector<float> entries = random.normal(n_entries * 2 * pairs);
  const double temperature = 0.7;
  const StageMoments moments = soft_assignment(vectors, entries, n_entries, temperature);
  std::vector<double> joint(n_entries * n_entries, 0.0);
  for (int t = 0; t < 40; ++t) {
    std::vector<double> distance;
    for (int a = 0; a < n_entries; ++a) {
      for (int b = 0; b < n_entries; ++b) {
        double sum = 0;
        for (int j = 0; j < pairs; ++j) {
          const float* u = &entries[a * 2 * pairs];
          const float* w = &entries[b * 2 * pairs];
          sum += std::pow(vectors.tile(0)[j * 64 + t] - u[j] + w[pairs + j], 2);
          sum += std::pow(vectors.tile(0)[(pairs + j) * 64 + t] - u[pairs + j] - w[j], 2);
        }
        distance.push_back(sum);
      }
    }
    const double least = *std::min_element(distance.begin(), distance.end());
    double total = 0;
    for (double d : distance) total += std::exp((least - d) / temperature);
    for (size_t c = 0; c < joint.size(); ++c) {
      joint[c] += std::exp((least - distance[c]) / temperature) / total;
    }
  }
  // Weights below e^-12 of the largest are dropped.
  for (size_t c = 0; c < joint.size(); ++c) EXPECT_NEAR(moments.joint[c], joint[c], 2e-4);
}

// A stage never makes the error larger, and one trained stage beats its random start by far.
TEST(Training, EveryStageLowersTheError) {
  Random random(3);
  const int heads = 2, n = 1500, dims = 32;
  const std::vector<float> keys = keys_of(random, heads, n, dims, rope_of(dims));
  const Trained trained = train(keys, heads, n, dims, 5, 32);
  for (const auto& errors : trained.report.relative_error) {
    ASSERT_EQ(errors.size(), 5u);
    EXPECT_LT(errors[0], 0.15);
    for (size_t r = 1; r < errors.size(); ++r) EXPECT_LT(errors[r], 0.95 * errors[r - 1]);
    EXPECT_LT(errors[4], 0.03);
  }
}

// What it reports is what the codec does.
TEST(Training, ReportsTheErrorOfTheCodec) {
  Random random(4);
  const int n = 640, dims = 32;
  const std::vector<float> keys = keys_of(random, 1, n, dims, rope_of(dims));
  const Trained trained = train(keys, 1, n, dims, 3, 16);
  const CodecPtr codec = make_commvq_codec(
      1, rope_of(dims), TensorView(trained.book.data(), DType::float16, {1, 3, 16, 2, dims / 2}),
      {});
  double error = 0, energy = 0;
  std::vector<uint8_t> block(codec->block_bytes());
  std::vector<float> y(64 * dims);
  for (int start = 0; start < n; start += 64) {
    codec->encode_block(Backend::cpu, {0, 0, start}, &keys[start * dims], 64, block.data());
    codec->decode_block(Backend::cpu, {0, 0, start}, block.data(), 64, y.data(), dims);
    for (int t = 0; t < 64; ++t) {
      double e = 0, s = 0;
      for (int d = 0; d < dims; ++d) {
        e += std::pow(y[t * dims + d] - keys[(start + t) * dims + d], 2);
        s += std::pow(keys[(start + t) * dims + d], 2);
      }
      error += e / s;  // training normalises every token
      energy += 1;
    }
  }
  EXPECT_NEAR(error / energy, trained.report.relative_error[0][2], 1e-3 * error / energy + 1e-6);
}

TEST(Training, DoesNotDependOnThreadsOrLevels) {
  Random random(5);
  const int heads = 2, n = 1100, dims = 16;
  const std::vector<float> keys = keys_of(random, heads, n, dims, rope_of(dims));
  CommVQParams params;
  params.max_steps = 6;
  set_num_threads(1);
  const Trained one = train(keys, heads, n, dims, 2, 16, params);
  set_num_threads(0);
  EXPECT_EQ(train(keys, heads, n, dims, 2, 16, params).book, one.book);
  for (const std::string& level : simd_levels()) {
    set_simd_level(level);
    EXPECT_EQ(train(keys, heads, n, dims, 2, 16, params).book, one.book) << level;
  }
  set_simd_level("");
  set_default_backend(Backend::reference);
  EXPECT_EQ(train(keys, heads, n, dims, 2, 16, params).book, one.book);
  set_default_backend(Backend::cpu);
  params.seed = 1;
  EXPECT_NE(train(keys, heads, n, dims, 2, 16, params).book, one.book);
}

// The metric moves the error to where the queries do not look.
TEST(Training, TheWeightChoosesWhereTheErrorGoes) {
  Random random(6);
  const int n = 1000, dims = 16, pairs = 8;
  const std::vector<float> keys = keys_of(random, 1, n, dims, rope_of(dims));
  std::vector<float> weight(pairs, 1.0f);
  weight[2] = 20.0f;
  const auto error_of_pair = [&](const std::vector<float>& w) {
    const Trained trained = train(keys, 1, n, dims, 1, 16, {}, w);
    const CodecPtr codec = make_commvq_codec(
        1, rope_of(dims), TensorView(trained.book.data(), DType::float16, {1, 1, 16, 2, pairs}),
        w.empty() ? TensorView() : TensorView(w.data(), DType::float32, {1, pairs}));
    std::vector<uint8_t> block(codec->block_bytes());
    std::vector<float> y(64 * dims);
    codec->encode_block(Backend::cpu, {}, keys.data(), 64, block.data());
    codec->decode_block(Backend::cpu, {}, block.data(), 64, y.data(), dims);
    double error = 0;
    for (int t = 0; t < 64; ++t) {
      error += std::pow(y[t * dims + 2] - keys[t * dims + 2], 2) +
               std::pow(y[t * dims + 2 + pairs] - keys[t * dims + 2 + pairs], 2);
    }
    return error;
  };
  EXPECT_LT(error_of_pair(weight), 0.5 * error_of_pair({}));
}

TEST(Training, QueryMomentsBecomeTheMetricOfPairs) {
  const Rope rope = rope_of(8);
  // Pairs (0, 4), (1, 5), (2, 6), (3, 7): root mean squares 1, 2, 0 (floored), 5.
  const float moments[] = {1, 8, 0, 0, 1, 0, -3, 50};
  float weight[4];
  commvq_weight(TensorView(moments, DType::float32, {1, 8}), rope,
                MutableTensorView(weight, DType::float32, {1, 4}));
  EXPECT_FLOAT_EQ(weight[0], 0.5f);
  EXPECT_FLOAT_EQ(weight[1], 1.0f);
  EXPECT_FLOAT_EQ(weight[2], 1e-3f);
  EXPECT_FLOAT_EQ(weight[3], 2.5f);
}

TEST(Training, DegenerateKeysGiveFiniteCodebooks) {
  Random random(7);
  const int dims = 16;
  std::vector<std::vector<float>> cases;
  cases.push_back(std::vector<float>(100 * dims, 0.0f));  // nothing at all
  cases.push_back(std::vector<float>(100 * dims, 3.0f));  // constant channels
  cases.push_back(random.normal(3 * dims));               // fewer vectors than entries
  cases.push_back(random.normal(1 * dims));
  cases.push_back(random.normal(100 * dims));
  for (int t = 0; t < 50; ++t) cases.back()[t * dims] = t % 2 ? NAN : INFINITY;
  cases.push_back(std::vector<float>(20 * dims, NAN));    // no finite token
  cases.push_back(std::vector<float>(20 * dims, 3e38f));  // squares overflow
  for (const auto& keys : cases) {
    const int n = static_cast<int>(keys.size()) / dims;
    const Trained trained = train(keys, 1, n, dims, 3, 16);
    for (uint16_t v : trained.book) EXPECT_NE(v & 0x7c00, 0x7c00);
    for (double e : trained.report.relative_error[0]) EXPECT_TRUE(std::isfinite(e));
  }
}

TEST(Training, RefusesWhatDoesNotFit) {
  Random random(8);
  const std::vector<float> keys = random.normal(10 * 16);
  CommVQParams params;
  params.max_steps = 0;
  EXPECT_THROW(train(keys, 1, 10, 16, 2, 16, params), Error);
  params = {};
  params.cold = 1;
  EXPECT_THROW(train(keys, 1, 10, 16, 2, 16, params), Error);
  EXPECT_THROW(train(keys, 1, 10, 16, 2, 65), Error);
  EXPECT_THROW(train(keys, 1, 10, 16, 2, 16, {}, std::vector<float>(8, 0.0f)), Error);
  std::vector<uint16_t> book(2 * 16 * 16);
  EXPECT_THROW(
      train_commvq(TensorView(keys.data(), DType::float32, {1, 10, 16}), counting(9), rope_of(16),
                   {}, {}, MutableTensorView(book.data(), DType::float16, {1, 2, 16, 2, 8})),
      Error);
}

}  // namespace
}  // namespace veloxquant
