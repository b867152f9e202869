// Comparisons with steps decide as squared distances do, on every level: at the decision
// boundaries, for tables in any order, and far outside of them.
#include "src/codecs/turboquant/nearest.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "src/math/centroids.h"
#include "src/math/hadamard.h"
#include "tests/support/exact_random.h"
#include "veloxquant/backend.h"
#include "veloxquant/scalar_quant.h"

namespace veloxquant {
namespace {

using test::ExactRandom;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Around every midpoint of two centroids and every step, and what troubles arithmetic.
std::vector<float> troubling_inputs(const std::vector<float>& centroids) {
  std::vector<float> centres{0.0f, 1.0f, -1.0f, 1e-30f, -1e-40f, 1e9f, -1e9f, 3e38f, -3e38f};
  for (float a : centroids) {
    for (float b : centroids) centres.push_back(0.5f * a + 0.5f * b);
  }
  turboquant::ScalarSteps steps;
  if (turboquant::find_steps(centroids.data(), static_cast<int>(centroids.size()), steps)) {
    centres.insert(centres.end(), {steps.bound, -steps.bound});
    for (int i = 0; i < steps.n_steps; ++i) centres.push_back(steps.step[i]);
  }
  std::vector<float> x{kInfinity, -kInfinity, NAN, -NAN, -0.0f};
  for (float centre : centres) {
    float up = centre, down = centre;
    x.push_back(centre);
    for (int ulps = 0; ulps < 3; ++ulps) {
      x.push_back(up = std::nextafter(up, kInfinity));
      x.push_back(down = std::nextafter(down, -kInfinity));
    }
  }
  return x;
}

void expect_reference_decisions(const std::vector<float>& centroids, const std::vector<float>& x) {
  const int64_t n = static_cast<int64_t>(x.size());
  std::vector<uint8_t> codes(n), wanted(n);
  float distance;
  for (int64_t i = 0; i < n; ++i) {
    wanted[i] = static_cast<uint8_t>(nearest_centroid(
        &x[i], 1, centroids.data(), static_cast<int>(centroids.size()), 1, &distance));
  }
  nearest_scalar(Backend::reference, DType::float32, x.data(), n, centroids.data(),
                 static_cast<int>(centroids.size()), codes.data());
  ASSERT_EQ(codes, wanted);
  for (const std::string& level : simd_levels()) {
    set_simd_level(level);
    std::fill(codes.begin(), codes.end(), uint8_t{0xa5});
    nearest_scalar(Backend::cpu, DType::float32, x.data(), n, centroids.data(),
                   static_cast<int>(centroids.size()), codes.data());
    for (int64_t i = 0; i < n; ++i) {
      ASSERT_EQ(+codes[i], +wanted[i])
          << level << ", " << centroids.size() << " centroids, x = " << std::hexfloat << x[i];
    }
  }
  set_simd_level("");
}

std::vector<float> sorted_values(ExactRandom& random, int n, float scale) {
  std::vector<float> table = random.values(n);
  for (float& v : table) v *= scale;
  std::sort(table.begin(), table.end());
  return table;
}

TEST(NearestScalar, DecidesAtTheBoundariesAsTheReference) {
  ExactRandom random(1);
  for (int n = 1; n <= 17; ++n) {
    for (float scale : {1.0f, 0x1p-7f, 0x1p-40f, 0x1p30f}) {
      for (int round = 0; round < 4; ++round) {
        std::vector<float> table = sorted_values(random, n, scale);
        if (round == 1) std::swap(table.front(), table.back());
        if (round == 2) table.back() = table.front();  // a twin
        if (round == 3) table[n / 2] = std::nextafter(table[n / 3], kInfinity);
        std::vector<float> x = troubling_inputs(table);
        for (int i = 0; i < 200; ++i) x.push_back(random.value() * scale * 2.0f);
        expect_reference_decisions(table, x);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(NearestScalar, OddTables) {
  ExactRandom random(2);
  for (std::vector<float> table : {std::vector<float>{0.0f, -0.0f},
                                   {3e38f, -3e38f},
                                   {1e-45f, 0.0f, -1e-45f},
                                   {NAN, 1.0f},
                                   {0.5f, kInfinity, -1.0f, 2.0f},
                                   {-kInfinity, NAN},
                                   {7.0f, 7.0f, 7.0f, 7.0f},
                                   {1e8f, 1e8f + 8.0f, 0.0f, -1e8f},
                                   {1e-20f, 2e-20f, 3e-20f}}) {
    std::vector<float> x = troubling_inputs(table);
    for (float v : random.values(100)) x.push_back(v);
    expect_reference_decisions(table, x);
    if (HasFatalFailure()) return;
  }
}

TEST(NearestScalar, StepsServeTheTablesOfScalarQuantisers) {
  ExactRandom random(3);
  for (int n : {2, 4, 8, 16}) {
    std::vector<float> table(n);
    for (int i = 0; i < n; ++i) table[i] = (2 * i + 1 - n) * 0.02f;
    turboquant::ScalarSteps steps;
    ASSERT_TRUE(turboquant::find_steps(table.data(), n, steps));
    EXPECT_EQ(steps.n_steps, n - 1);
    EXPECT_TRUE(steps.ascending);
    EXPECT_GE(steps.bound, 1e4f);
    std::swap(table[0], table[1]);
    ASSERT_TRUE(turboquant::find_steps(table.data(), n, steps));
    EXPECT_FALSE(steps.ascending);
  }
  const std::vector<float> close{1.0f, std::nextafter(1.0f, 2.0f)};
  turboquant::ScalarSteps steps;
  EXPECT_FALSE(turboquant::find_steps(close.data(), 2, steps));
}

TEST(NearestScalar, TailsAndDtypes) {
  ExactRandom random(4);
  const std::vector<float> table = sorted_values(random, 16, 1.0f);
  for (int64_t n : {0, 1, 7, 8, 31, 32, 33, 100, 8192, 20000}) {
    const std::vector<uint16_t> halves = random.halves(n);
    std::vector<float> x(n);
    for (int64_t i = 0; i < n; ++i) x[i] = f16_to_f32(halves[i]);
    expect_reference_decisions(table, x);
    std::vector<uint8_t> codes(n), wanted(n);
    nearest_scalar(Backend::reference, DType::float16, halves.data(), n, table.data(), 16,
                   wanted.data());
    nearest_scalar(Backend::cpu, DType::float16, halves.data(), n, table.data(), 16, codes.data());
    EXPECT_EQ(codes, wanted) << n;
  }
}

TEST(NearestScalarOfHadamard, EqualsTheReference) {
  ExactRandom random(5);
  for (int dim = 1; dim <= 1024; dim *= 2) {
    for (int n_centroids : {2, 4, 8, 16, 20}) {
      const std::vector<float> table = sorted_values(random, n_centroids, 1.0f);
      for (int64_t rows : {1, 3, 67}) {
        std::vector<float> x = random.values(rows * dim), diag = random.values(dim);
        x[random.below(static_cast<int>(rows * dim))] = NAN;
        std::vector<uint8_t> codes(rows * dim), wanted(rows * dim);
        nearest_scalar_of_hadamard(Backend::reference, DType::float32, x.data(), rows, dim,
                                   diag.data(), table.data(), n_centroids, wanted.data());
        for (const std::string& level : simd_levels()) {
          set_simd_level(level);
          nearest_scalar_of_hadamard(Backend::cpu, DType::float32, x.data(), rows, dim, diag.data(),
                                     table.data(), n_centroids, codes.data());
          ASSERT_EQ(codes, wanted) << level << " " << dim << " " << n_centroids;
        }
        set_simd_level("");
      }
    }
  }
}

}  // namespace
}  // namespace veloxquant
