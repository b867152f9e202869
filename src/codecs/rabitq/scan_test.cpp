// The scans: golden words, exact integers, every SIMD level against the reference bit for bit.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "src/codecs/rabitq/scan.h"
#include "tests/support/random.h"
#include "veloxquant/rabitq.h"

namespace veloxquant {
namespace {

using test::Random;

std::vector<uint8_t> random_bytes(Random& random, int64_t n) {
  std::vector<uint8_t> bytes(n);
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(random.next());
  return bytes;
}

TEST(Hamming, GoldenWords) {
  const uint8_t query[] = {0xb1};
  const uint8_t codes[] = {0xb1, 0x4e, 0xb0};
  const float offset[] = {0, 0, 0};
  for (Backend backend : {Backend::reference, Backend::cpu}) {
    float out[3];
    hamming_score(backend, query, codes, 3, 8, offset, 1.0f, out);
    EXPECT_EQ(out[0], 0.0f);
    EXPECT_EQ(out[1], 8.0f);
    EXPECT_EQ(out[2], 1.0f);
    const float shifted[] = {1.5f, -2.0f, 0.25f};
    hamming_score(backend, query, codes, 3, 8, shifted, 0.5f, out);
    EXPECT_EQ(out[0], 1.5f);
    EXPECT_EQ(out[1], 2.0f);
    EXPECT_EQ(out[2], 0.75f);
  }
}

class EveryLevel : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { set_simd_level(GetParam()); }
  void TearDown() override { set_simd_level(""); }
};

// Sizes at which a vector, a group or a key ends, dimensions that fill no byte, long keys.
TEST_P(EveryLevel, HammingEqualsTheReference) {
  Random random(21);
  for (int dims : {1,  3,   7,   8,   12,  16,  48,  63,  64,   72,   80,
                   96, 120, 127, 128, 136, 192, 256, 320, 1000, 1024, 4104}) {
    const int n_bytes = (dims + 7) / 8;
    for (int n : {0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 1000}) {
      // Exactly as large as it may be: a read beyond the end is one that ASan sees.
      const std::vector<uint8_t> codes = random_bytes(random, int64_t{n} * n_bytes);
      const std::vector<uint8_t> query = random_bytes(random, n_bytes);
      const std::vector<float> offset = random.normal(n);
      std::vector<float> expected(n, NAN), out(n, NAN);
      hamming_score(Backend::reference, query.data(), codes.data(), n, dims, offset.data(), 0.3f,
                    expected.data());
      hamming_score(Backend::cpu, query.data(), codes.data(), n, dims, offset.data(), 0.3f,
                    out.data());
      // memcmp may not be handed the null pointer of an empty vector.
      ASSERT_TRUE(n == 0 || std::memcmp(out.data(), expected.data(), sizeof(float) * n) == 0)
          << dims << " dims, " << n << " keys";
    }
  }
}

TEST_P(EveryLevel, PopcountIsTheIntegerDotProduct) {
  Random random(22);
  for (int dims : {1, 5, 8, 16, 48, 64, 80, 96, 100, 128, 256, 1000}) {
    const int n_bytes = (dims + 7) / 8;
    for (int n_bits : {1, 2, 3, 4, 5, 8}) {
      const std::vector<float> q = random.normal(dims);
      const PopcountQuery query = quantize_popcount_query(q.data(), dims, n_bits);
      for (int n : {1, 3, 17, 64, 131}) {
        const std::vector<uint8_t> codes = random_bytes(random, int64_t{n} * n_bytes);
        std::vector<uint32_t> dots(n), counts(n);
        popcount_dots(Backend::cpu, query, codes.data(), n, dots.data(), counts.data());
        for (int i = 0; i < n; ++i) {
          // From the definition, one dimension after the other.
          uint32_t dot = 0, count = 0, sum = 0;
          for (int d = 0; d < dims; ++d) {
            const uint32_t x = (codes[i * n_bytes + d / 8] >> (d % 8)) & 1;
            uint32_t u = 0;
            for (int j = 0; j < n_bits; ++j) {
              u |= ((query.planes[j * n_bytes + d / 8] >> (d % 8)) & 1u) << j;
            }
            dot += x * u;
            count += x;
            sum += u;
          }
          ASSERT_EQ(dots[i], dot) << dims << " dims, " << n_bits << " bits";
          ASSERT_EQ(counts[i], count);
          ASSERT_EQ(query.sum, sum);
        }
      }
    }
  }
}

TEST_P(EveryLevel, PopcountScoresEqualTheReference) {
  Random random(23);
  const int dims = 128, n = 5000;
  const std::vector<float> q = random.normal(dims), factors = random.normal(n);
  const std::vector<uint8_t> codes = random_bytes(random, n * dims / 8);
  const PopcountQuery query = quantize_popcount_query(q.data(), dims, 4);
  std::vector<float> expected(n), out(n);
  popcount_score(Backend::reference, query, codes.data(), n, factors.data(), expected.data());
  popcount_score(Backend::cpu, query, codes.data(), n, factors.data(), out.data());
  EXPECT_EQ(0, std::memcmp(out.data(), expected.data(), sizeof(float) * n));
}

// 10^5 calls of each function, spread over the levels, with sizes and data at random.
TEST_P(EveryLevel, FuzzedCallsEqualTheReference) {
  const uint64_t seed = 4242;
  RecordProperty("seed", std::to_string(seed));
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  Random random(seed + GetParam().size() * 1000 + GetParam().back());
  const int n_calls = 100000 / static_cast<int>(simd_levels().size());
  for (int call = 0; call < n_calls; ++call) {
    const int dims = 1 + static_cast<int>(random.next() % (call % 16 == 0 ? 600 : 140));
    const int n_bytes = (dims + 7) / 8, n = static_cast<int>(random.next() % 20);
    const std::vector<uint8_t> codes = random_bytes(random, int64_t{n} * n_bytes);
    const std::vector<uint8_t> query = random_bytes(random, n_bytes);
    std::vector<float> offset(n), expected(n), out(n);
    for (float& o : offset) o = static_cast<float>(random.uniform());
    const float scale = static_cast<float>(random.uniform() * 4 - 2);
    hamming_score(Backend::reference, query.data(), codes.data(), n, dims, offset.data(), scale,
                  expected.data());
    hamming_score(Backend::cpu, query.data(), codes.data(), n, dims, offset.data(), scale,
                  out.data());
    ASSERT_EQ(out, expected) << "call " << call;
    std::vector<float> q(dims);
    for (float& v : q) v = static_cast<float>(random.uniform() - 0.5);
    const PopcountQuery rounded =
        quantize_popcount_query(q.data(), dims, 1 + static_cast<int>(random.next() % 8));
    popcount_score(Backend::reference, rounded, codes.data(), n, offset.data(), expected.data());
    popcount_score(Backend::cpu, rounded, codes.data(), n, offset.data(), out.data());
    ASSERT_EQ(out, expected) << "call " << call;
  }
}

INSTANTIATE_TEST_SUITE_P(Simd, EveryLevel, ::testing::ValuesIn(simd_levels()));

// The score is the inner product of +-1 with the query that the integers stand for, exactly but
// for the rounding of a few fp32 operations.
TEST(Popcount, ScoreIsTheDotProductWithTheRoundedQuery) {
  Random random(24);
  for (int dims : {48, 64, 80, 128, 256}) {
    const std::vector<float> q = random.normal(dims);
    const PopcountQuery query = quantize_popcount_query(q.data(), dims, 4);
    const std::vector<uint8_t> codes = random_bytes(random, 50 * dims / 8);
    const std::vector<float> ones(50, 1.0f);
    std::vector<float> out(50);
    popcount_score(Backend::cpu, query, codes.data(), 50, ones.data(), out.data());
    for (int i = 0; i < 50; ++i) {
      double score = 0;
      for (int d = 0; d < dims; ++d) {
        uint32_t u = 0;
        for (int j = 0; j < 4; ++j) {
          u |= ((query.planes[j * dims / 8 + d / 8] >> (d % 8)) & 1u) << j;
        }
        const double rounded = query.low + double(query.step) * u;
        EXPECT_LE(std::abs(rounded - q[d]), 0.5001 * query.step);
        score += ((codes[i * dims / 8 + d / 8] >> (d % 8)) & 1) ? rounded : -rounded;
      }
      EXPECT_NEAR(out[i], score, 1e-4 * dims);
    }
  }
}

TEST(Popcount, ConstantAndZeroQueries) {
  for (float value : {0.0f, -0.0f, 3.0f, 1e-40f}) {
    const std::vector<float> q(64, value);
    const PopcountQuery query = quantize_popcount_query(q.data(), 64, 4);
    EXPECT_EQ(query.sum, 0u);
    const std::vector<uint8_t> codes(8, 0xf0);
    const float factor = 1.0f;
    float out;
    popcount_score(Backend::cpu, query, codes.data(), 1, &factor, &out);
    EXPECT_NEAR(out, 0.0f, 1e-5f);  // as many dimensions up as down
  }
}

TEST(Scans, RefuseWhatDoesNotFit) {
  const float q[8] = {};
  EXPECT_THROW(quantize_popcount_query(q, 8, 0), Error);
  EXPECT_THROW(quantize_popcount_query(q, 8, 9), Error);
  EXPECT_THROW(quantize_popcount_query(q, 0, 4), Error);
  const float bad[2] = {1.0f, NAN};
  EXPECT_THROW(quantize_popcount_query(bad, 2, 4), Error);
  const float huge[2] = {1.0f, std::numeric_limits<float>::infinity()};
  EXPECT_THROW(quantize_popcount_query(huge, 2, 4), Error);
  PopcountQuery query = quantize_popcount_query(q, 8, 4);
  query.planes.pop_back();
  uint32_t n;
  EXPECT_THROW(popcount_dots(Backend::cpu, query, nullptr, 0, &n, &n), Error);
  EXPECT_THROW(hamming_score(Backend::cpu, nullptr, nullptr, 0, 32769, nullptr, 1, nullptr), Error);
}

}  // namespace
}  // namespace veloxquant
