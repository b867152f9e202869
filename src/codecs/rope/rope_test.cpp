// Rotary embeddings: angles against libm, every SIMD level against the reference bit for bit,
// the inverse, and what does not depend on the implementation at all.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "src/codecs/rope/kernels.h"
#include "src/math/sincos.h"
#include "tests/support/random.h"
#include "veloxquant/error.h"

namespace veloxquant {
namespace {

using test::Random;

RopeSpec spec_of(int head_dim, int rotary_dims, bool traditional, float base = 10000.0f) {
  RopeSpec spec;
  spec.head_dim = head_dim;
  spec.traditional = traditional;
  for (int j = 0; j < rotary_dims / 2; ++j) {
    spec.inv_freq.push_back(static_cast<float>(std::pow(base, -2.0 * j / rotary_dims)));
  }
  return spec;
}

class Levels : public ::testing::Test {
 protected:
  void TearDown() override { set_simd_level(""); }
};

TEST(SinCos, IsExactToTheLastBitsOfDoubleBelowTheLimit) {
  Random random(1);
  for (int i = 0; i < 200000; ++i) {
    const double size = std::pow(10.0, 8.0 * random.uniform() - 0.8);
    const float angle = static_cast<float>(size * (random.uniform() < 0.5 ? -1 : 1));
    if (std::abs(angle) >= kMaxAngle) continue;
    double sine, cosine;
    sincos(angle, &sine, &cosine);
    ASSERT_NEAR(sine, std::sin(static_cast<double>(angle)), 3e-16) << angle;
    ASSERT_NEAR(cosine, std::cos(static_cast<double>(angle)), 3e-16) << angle;
  }
}

TEST(SinCos, AnglesWithoutAPhaseCountAsZero) {
  for (float angle : {kMaxAngle, -kMaxAngle, 1e30f, std::numeric_limits<float>::infinity(),
                      std::numeric_limits<float>::quiet_NaN()}) {
    double sine, cosine;
    sincos(angle, &sine, &cosine);
    EXPECT_EQ(sine, 0.0);
    EXPECT_EQ(cosine, 1.0);
  }
}

TEST_F(Levels, TablesAndTurnsEqualTheReference) {
  Random random(2);
  for (int dims : {8, 16, 48, 64, 80, 96, 128, 256}) {
    for (int rotary : {dims, dims / 2, 2, 0}) {
      for (bool traditional : {false, true}) {
        RopeSpec spec = spec_of(dims, rotary, traditional);
        spec.attention_factor = 1.19f;
        spec.position_scale = 0.25f;
        if (rotary > 2) spec.inv_freq.back() = 1e7f;  // most of its angles have no phase
        const Rope rope(spec);
        for (int64_t position : {0, 1, 63, 4097, 999999, 16777217, -5}) {
          const std::vector<float> x = random.normal(64 * dims);
          for (RopeDirection way : {RopeDirection::forward, RopeDirection::inverse}) {
            std::vector<float> expected = x;
            rope.turn_tile(Backend::reference, way, position, expected.data());
            for (const std::string& level : simd_levels()) {
              set_simd_level(level);
              std::vector<float> y = x;
              rope.turn_tile(Backend::cpu, way, position, y.data());
              ASSERT_EQ(0, std::memcmp(y.data(), expected.data(), 4 * y.size()))
                  << level << " " << dims << " " << rotary << " " << position;
            }
          }
        }
      }
    }
  }
}

TEST(RopeMath, InverseUndoesForward) {
  Random random(3);
  for (int dims : {8, 48, 64, 80, 96, 128, 256}) {
    for (bool traditional : {false, true}) {
      RopeSpec spec = spec_of(dims, dims / 2, traditional);
      spec.attention_factor = 0.7f;
      const Rope rope(spec);
      for (int n : {1, 63, 65}) {
        std::vector<int64_t> positions(n);
        for (int64_t& p : positions) p = static_cast<int64_t>(1e6 * random.uniform());
        const std::vector<float> x = random.normal(n * dims);
        std::vector<float> y = x;
        rope.turn_rows(Backend::cpu, RopeDirection::forward, positions.data(), n, y.data(), dims);
        rope.turn_rows(Backend::cpu, RopeDirection::inverse, positions.data(), n, y.data(), dims);
        for (int r = 0; r < n; ++r) {
          for (const RopePair& pair : rope.pairs()) {
            const int i = r * dims + pair.first, k = r * dims + pair.second;
            const double size = std::hypot(x[i], x[k]);
            EXPECT_NEAR(y[i], x[i], 1e-6 * size);
            EXPECT_NEAR(y[k], x[k], 1e-6 * size);
          }
        }
      }
    }
  }
}

// Against the definition in double, both layouts, dimensions beyond the rotary ones untouched.
TEST(RopeMath, TurnsPairsByTheirAngle) {
  Random random(4);
  for (bool traditional : {false, true}) {
    const int dims = 48, rotary = 32;
    RopeSpec spec = spec_of(dims, rotary, traditional, 500000.0f);
    spec.attention_factor = 1.5f;
    spec.position_scale = 0.5f;
    const Rope rope(spec);
    const int64_t position = 12345;
    const std::vector<float> x = random.normal(dims);
    std::vector<float> y = x;
    rope.turn_rows(Backend::cpu, RopeDirection::forward, &position, 1, y.data(), dims);
    for (int j = 0; j < rotary / 2; ++j) {
      const int a = traditional ? 2 * j : j, b = traditional ? 2 * j + 1 : j + rotary / 2;
      const double angle = static_cast<double>(0.5f * 12345.0f * spec.inv_freq[j]);
      EXPECT_NEAR(y[a], 1.5 * (x[a] * std::cos(angle) - x[b] * std::sin(angle)), 1e-6);
      EXPECT_NEAR(y[b], 1.5 * (x[a] * std::sin(angle) + x[b] * std::cos(angle)), 1e-6);
    }
    for (int d = rotary; d < dims; ++d) EXPECT_EQ(y[d], x[d]);
  }
}

// Scores depend on the distance of query and key alone.
TEST(RopeMath, ScoresDependOnTheDistance) {
  Random random(5);
  const int dims = 64;
  const Rope rope(spec_of(dims, dims, false));
  const std::vector<float> q = random.normal(dims), k = random.normal(dims);
  double first = 0;
  for (int64_t shift : {0, 100, 4000}) {
    std::vector<float> rows = q;
    rows.insert(rows.end(), k.begin(), k.end());
    const int64_t positions[] = {shift + 37, shift};
    rope.turn_rows(Backend::cpu, RopeDirection::forward, positions, 2, rows.data(), dims);
    double score = 0;
    for (int d = 0; d < dims; ++d) score += static_cast<double>(rows[d]) * rows[dims + d];
    if (shift == 0) first = score;
    // The angle itself is rounded to fp32.
    EXPECT_NEAR(score, first, 64 * 4e-4) << shift;
  }
}

TEST(RopeErrors, AreClear) {
  RopeSpec spec = spec_of(64, 64, false);
  EXPECT_NO_THROW(Rope{spec});
  spec.head_dim = 63;
  EXPECT_THROW(Rope{spec}, Error);
  spec.head_dim = 62;
  EXPECT_THROW(Rope{spec}, Error);
  spec.head_dim = 64;
  spec.inv_freq[3] = NAN;
  EXPECT_THROW(Rope{spec}, Error);
  spec.inv_freq[3] = 1;
  spec.attention_factor = 0;
  EXPECT_THROW(Rope{spec}, Error);
  spec.attention_factor = 1;
  spec.position_scale = INFINITY;
  EXPECT_THROW(Rope{spec}, Error);
}

}  // namespace
}  // namespace veloxquant
