// VecInfer on pre-RoPE keys: what differs from VecInfer. That every level gives the same bits is
// held by the conformance suite.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "src/math/float16.h"
#include "tests/support/random.h"
#include "veloxquant/commvq.h"
#include "veloxquant/vecinfer.h"
#include "veloxquant/vecinfer_rope.h"

namespace veloxquant {
namespace {

using test::Random;

constexpr int kDims = 32, kPairs = 16;

Rope rope_of(bool traditional = false) {
  RopeSpec spec;
  spec.head_dim = kDims;
  spec.traditional = traditional;
  for (int j = 0; j < kPairs; ++j) {
    spec.inv_freq.push_back(static_cast<float>(std::pow(10000.0, -j / double(kPairs))));
  }
  return Rope(spec);
}

// Pairs whose sizes differ by powers of two and whose means are large; pair j of size 2^-(j % 8).
std::vector<float> plain_keys(Random& random, int n) {
  std::vector<float> mean = random.normal(kDims), rows;
  for (int t = 0; t < n; ++t) {
    for (int d = 0; d < kDims; ++d) {
      const double size = std::pow(0.5, (d % kPairs) % 8);
      rows.push_back(static_cast<float>(size * (3 * mean[d] + random.normal())));
    }
  }
  return rows;
}

std::vector<int64_t> counting(int n) {
  std::vector<int64_t> positions(n);
  std::iota(positions.begin(), positions.end(), int64_t{0});
  return positions;
}

struct Trained {
  std::vector<int32_t> order;
  std::vector<uint16_t> tables;
  std::vector<float> weight;
  CodecPtr codec;
  double error = 0;
};

Trained train(const std::vector<float>& keys, int n, int n_subvectors, int n_centroids) {
  Trained out;
  out.order.resize(kPairs);
  out.weight.assign(kPairs, 1.0f);
  out.tables.resize(n_centroids * kDims);
  const int d = kDims / n_subvectors;
  KMeansParams params;
  params.n_centroids = n_centroids;
  const TensorView weight(out.weight.data(), DType::float32, {1, kPairs});
  out.error =
      train_vecinfer_rope(
          TensorView(keys.data(), DType::float32, {1, n, kDims}), counting(n), rope_of(), weight,
          n_subvectors, params, MutableTensorView(out.order.data(), DType::int32, {1, kPairs}),
          MutableTensorView(out.tables.data(), DType::float16, {1, n_subvectors, n_centroids, d}))
          .relative_error[0];
  out.codec = make_vecinfer_rope_codec(
      1, rope_of(), n_subvectors,
      TensorView(out.tables.data(), DType::float16, {1, n_subvectors, n_centroids, d}),
      TensorView(out.order.data(), DType::int32, {1, kPairs}),
      TensorView(out.weight.data(), DType::float32, {1, kPairs}));
  return out;
}

TEST(Pairs, TheOrderIsAPermutationThatBalancesVolumes) {
  Random random(1);
  const std::vector<float> rows = plain_keys(random, 512);
  std::vector<float> keys = rows;
  const std::vector<int64_t> positions = counting(512);
  rope_of().turn_rows(Backend::cpu, RopeDirection::forward, positions.data(), 512, keys.data(),
                      kDims);
  const Trained trained = train(keys, 512, 8, 16);
  std::vector<int32_t> sorted = trained.order;
  std::sort(sorted.begin(), sorted.end());
  for (int j = 0; j < kPairs; ++j) EXPECT_EQ(sorted[j], j);
  // Sizes 2^-(j % 8): each sub-vector of two pairs gets exponents that add up to 7.
  for (int m = 0; m < 8; ++m) {
    EXPECT_NEAR(trained.order[2 * m] % 8 + trained.order[2 * m + 1] % 8, 7, 1);
  }
}

// The codec encodes what training saw, at the positions it saw, and its error is what it reports.
TEST(Pairs, ErrorOnTheTrainingKeysIsAsReported) {
  Random random(2);
  const int n = 640;
  std::vector<float> keys = plain_keys(random, n);
  const std::vector<int64_t> positions = counting(n);
  rope_of().turn_rows(Backend::cpu, RopeDirection::forward, positions.data(), n, keys.data(),
                      kDims);
  const Trained trained = train(keys, n, 8, 64);
  std::vector<uint8_t> block(trained.codec->block_bytes());
  std::vector<float> y(64 * kDims);
  double error = 0, energy = 0, misplaced = 0;
  for (int start = 0; start < n; start += 64) {
    const BlockPlace place{0, 0, start};
    trained.codec->encode_block(Backend::cpu, place, &keys[start * kDims], 64, block.data());
    trained.codec->decode_block(Backend::cpu, place, block.data(), 64, y.data(), kDims);
    for (int i = 0; i < 64 * kDims; ++i) {
      error += std::pow(y[i] - keys[start * kDims + i], 2);
      energy += std::pow(keys[start * kDims + i], 2);
    }
    trained.codec->decode_block(Backend::cpu, {0, 0, start + 900}, block.data(), 64, y.data(),
                                kDims);
    for (int i = 0; i < 64 * kDims; ++i) {
      misplaced += std::pow(y[i] - keys[start * kDims + i], 2);
    }
  }
  EXPECT_NEAR(error / energy, trained.error, 1e-3 * trained.error);
  EXPECT_LT(error, 0.02 * energy);
  EXPECT_GT(misplaced, 0.3 * energy);  // the position matters
}

// Keys that only RoPE moves are one point before it.
TEST(Pairs, AConstantKeyComesBackAtEveryPosition) {
  Random random(3);
  const std::vector<float> one = random.normal(kDims);
  const int n = 256;
  std::vector<float> keys;
  for (int t = 0; t < n; ++t) keys.insert(keys.end(), one.begin(), one.end());
  const std::vector<int64_t> positions = counting(n);
  rope_of().turn_rows(Backend::cpu, RopeDirection::forward, positions.data(), n, keys.data(),
                      kDims);
  const Trained trained = train(keys, n, 8, 4);
  std::vector<uint8_t> block(trained.codec->block_bytes());
  std::vector<float> y(64 * kDims);
  trained.codec->encode_block(Backend::cpu, {0, 0, 128}, &keys[128 * kDims], 64, block.data());
  trained.codec->decode_block(Backend::cpu, {0, 0, 128}, block.data(), 64, y.data(), kDims);
  for (int i = 0; i < 64 * kDims; ++i) EXPECT_NEAR(y[i], keys[128 * kDims + i], 2e-3);
}

TEST(Pairs, RefusesWhatDoesNotFit) {
  Random random(4);
  Trained made = train(plain_keys(random, 64), 64, 8, 4);
  const TensorView tables(made.tables.data(), DType::float16, {1, 8, 4, 4});
  const TensorView order(made.order.data(), DType::int32, {1, kPairs});
  const TensorView weight(made.weight.data(), DType::float32, {1, kPairs});
  EXPECT_NO_THROW(make_vecinfer_rope_codec(1, rope_of(), 8, tables, order, weight));
  EXPECT_THROW(make_vecinfer_rope_codec(1, rope_of(), 32, tables, order, weight), Error);
  EXPECT_THROW(make_vecinfer_rope_codec(2, rope_of(), 8, tables, order, weight), Error);
  EXPECT_THROW(make_vecinfer_rope_codec(1, rope_of(), 8, tables, weight, order), Error);
  std::vector<int32_t> twice = made.order;
  twice[0] = twice[1];
  EXPECT_THROW(
      make_vecinfer_rope_codec(1, rope_of(), 8, tables,
                               TensorView(twice.data(), DType::int32, {1, kPairs}), weight),
      Error);
  made.weight[3] = 0;
  EXPECT_THROW(make_vecinfer_rope_codec(1, rope_of(), 8, tables, order, weight), Error);
}

}  // namespace
}  // namespace veloxquant
