// The shared rotation, tables and sums of the calibration-free codecs.
#include "src/codecs/rotation.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "src/math/lloyd_max_tables.h"
#include "src/math/rotation.h"
#include "src/math/row_sums.h"
#include "tests/support/random.h"

namespace veloxquant {
namespace {

using test::Random;

const int kDims[] = {1, 2, 4, 8, 16, 24, 40, 48, 64, 72, 80, 96, 112, 120, 128, 136, 192, 256, 512};

TEST(Rotation, SignsOfASeedAreFixed) {
  // A change here changes every stored code.
  Rotation rotation(8, 42);
  std::string text;
  for (int i = 0; i < 16; ++i) text += rotation.signs()[i] > 0 ? '+' : '-';
  EXPECT_EQ(text, "-+-+-----++-+++-");
}

TEST(Rotation, EveryLevelEqualsTheReferenceBitForBit) {
  Random random(3);
  for (int dim : kDims) {
    Rotation rotation(dim, 7);
    const std::vector<float> x = random.normal(5 * dim);
    std::vector<float> forward = x, back = x, plain = x;
    rotation.forward(Backend::reference, forward.data(), 5);
    rotation.inverse(Backend::reference, back.data(), 5);
    hadamard_rows(Backend::reference, dim, plain.data(), 5);
    for (const std::string& level : simd_levels()) {
      set_simd_level(level);
      std::vector<float> f = x, b = x, h = x;
      rotation.forward(Backend::cpu, f.data(), 5);
      rotation.inverse(Backend::cpu, b.data(), 5);
      hadamard_rows(Backend::cpu, dim, h.data(), 5);
      EXPECT_EQ(0, std::memcmp(f.data(), forward.data(), f.size() * 4)) << level << " " << dim;
      EXPECT_EQ(0, std::memcmp(b.data(), back.data(), b.size() * 4)) << level << " " << dim;
      EXPECT_EQ(0, std::memcmp(h.data(), plain.data(), h.size() * 4)) << level << " " << dim;
    }
    set_simd_level("");
  }
}

TEST(Rotation, IsOrthogonalAndUndone) {
  Random random(4);
  for (int dim : kDims) {
    Rotation rotation(dim, 99);
    std::vector<float> q = random.normal(dim), k = random.normal(dim), y = k, p = q;
    rotation.forward(Backend::cpu, y.data(), 1);
    rotation.forward(Backend::cpu, p.data(), 1);
    double exact = 0, moved = 0, size = 0;
    for (int i = 0; i < dim; ++i) {
      exact += double(q[i]) * k[i];
      moved += double(p[i]) * y[i];
      size += std::abs(double(q[i]) * k[i]);
    }
    EXPECT_NEAR(moved, exact, 1e-5 * size) << dim;
    rotation.inverse(Backend::cpu, y.data(), 1);
    for (int i = 0; i < dim; ++i) EXPECT_NEAR(y[i], k[i], 3e-6f) << dim;
  }
}

// What one round fails at (ALGORITHMS 2.5): after two, no coordinate stays large, nor all equal.
TEST(Rotation, TwoRoundsSpreadAUnitVector) {
  for (int dim : {48, 64, 80, 96, 128, 256}) {
    double fourth = 0;
    for (int i = 0; i < dim; ++i) {
      Rotation rotation(dim, 1000 + i);
      std::vector<float> x(dim, 0.0f);
      x[i] = 1.0f;
      rotation.forward(Backend::cpu, x.data(), 1);
      for (float v : x) fourth += std::pow(double(v) * v * dim, 2) / dim / dim;
    }
    // Kurtosis of a Haar-rotated unit vector: 3 d / (d + 2). One round of a power of two: 1.
    EXPECT_NEAR(fourth, 3.0 * dim / (dim + 2), 0.45) << dim;
  }
}

TEST(RowSums, OrderIsSixteenPartialSums) {
  Random random(5);
  for (int n : {1, 8, 15, 16, 17, 24, 100, 128}) {
    std::vector<float> a = random.normal(n), b = random.normal(n);
    double exact = 0;
    for (int i = 0; i < n; ++i) exact += double(a[i]) * b[i];
    EXPECT_NEAR(dot_row(a.data(), b.data(), n), exact, 1e-5 * n);
  }
  std::vector<float> a(32, 0.0f), ones(32, 1.0f);
  a[0] = 1e8f;
  a[16] = -1e8f;  // the same partial sum: cancels before 3 is added from lane 1
  a[1] = 3.0f;
  EXPECT_EQ(dot_row(a.data(), ones.data(), 32), 3.0f);
}

// Density of sqrt(d) x_1 on the unit sphere, up to a factor; d = 0: N(0, 1).
double density(int d, double u) {
  if (d == 0) return std::exp(-0.5 * u * u);
  double rest = 1.0 - u * u / d;
  return rest <= 0 ? 0.0 : std::pow(rest, (d - 3) / 2.0);
}

// Each level is the mean of its cell (T2): by the midpoint rule on a fine grid.
TEST(LloydMax, LevelsAreTheMeansOfTheirCells) {
  for (int row = 0; row < 8; ++row) {
    const int d = 8 * row;
    const double limit = d == 0 ? 9.0 : std::sqrt(double(d));
    for (int bits = 1; bits <= kMaxScalarBits; ++bits) {
      const int n = 1 << (bits - 1), steps = 1000000;
      const float* levels = lloyd_max_levels(d == 0 ? 64 : d, bits);
      std::vector<double> mass(n), first(n);
      double squares = 0, total = 0;
      for (int i = 0; i < steps; ++i) {
        const double u = (i + 0.5) * limit / steps, w = density(d, u);
        int k = 0;
        while (k + 1 < n && u >= 0.5 * (double(levels[k]) + levels[k + 1])) ++k;
        mass[k] += w;
        first[k] += w * u;
        squares += w * (u - levels[k]) * (u - levels[k]);
        total += w;
      }
      for (int k = 0; k < n; ++k) EXPECT_NEAR(levels[k], first[k] / mass[k], 1e-5) << d;
      const double published[] = {.36338, .11748, .03455, .00950};  // ALGORITHMS 2.2
      if (d == 0) {
        EXPECT_NEAR(squares / total, published[bits - 1], 1e-5);
      }
    }
  }
}

// The second stage: the mean of what the first stage leaves, and the distortions of ALGORITHMS 2.7.
TEST(LloydMax, ResidualLevelsAreTheMeansOfTheirCells) {
  for (int row = 0; row < 8; ++row) {
    const int d = 8 * row;
    const double limit = d == 0 ? 9.0 : std::sqrt(double(d));
    for (int bits = 1; bits <= kMaxScalarBits; ++bits) {
      const int n = 1 << (bits - 1), steps = 400000;
      const float* one = lloyd_max_levels(d == 0 ? 64 : d, bits);
      const float* two = lloyd_max_residual_levels(d == 0 ? 64 : d, bits);
      std::vector<double> mass(n), first(n);
      double squares = 0, total = 0;
      for (int i = 0; i < steps; ++i) {
        const double u = (i + 0.5) * limit / steps, w = density(d, u);
        int k = 0, m = 0;
        while (k + 1 < n && u >= 0.5 * (double(one[k]) + one[k + 1])) ++k;
        const double r = std::abs(u - one[k]);
        while (m + 1 < n && r >= 0.5 * (double(two[m]) + two[m + 1])) ++m;
        mass[m] += w;
        first[m] += w * r;
        squares += w * (r - two[m]) * (r - two[m]);
        total += w;
      }
      for (int m = 0; m < n; ++m) EXPECT_NEAR(two[m], first[m] / mass[m], 2e-5) << d << " " << bits;
      const double expected[] = {.1310, .0197, .0019, .00019};
      if (d == 0) {
        EXPECT_NEAR(squares / total, expected[bits - 1], .01 * expected[bits - 1] + 5e-5);
      }
    }
  }
}

}  // namespace
}  // namespace veloxquant
