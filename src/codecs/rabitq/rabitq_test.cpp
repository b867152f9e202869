// RaBitQ as a codec: the paper's numbers, the same bits on every SIMD level, the format.
#include <gtest/gtest.h>

#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#include "src/codecs/rabitq/format.h"
#include "tests/support/random.h"
#include "veloxquant/codec_spec.h"
#include "veloxquant/rabitq.h"

namespace veloxquant {
namespace {

using test::Random;

constexpr float kTiny = std::numeric_limits<float>::denorm_min();
constexpr float kDenormal = 1e-40f;

CodecPtr make(int dim, int bits, RabitqScale scale = RabitqScale::unbiased, int heads = 1) {
  RabitqOptions options;
  options.bits = bits;
  options.scale = scale;
  options.seed = 5;
  return make_rabitq_codec(Side::keys, heads, dim, options);
}

double dot(const float* a, const float* b, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += double(a[i]) * b[i];
  return sum;
}

// n unit rows; row i of the second has inner product rho with row i of the first.
void unit_pairs(Random& random, int n, int dim, double rho, std::vector<float>& a,
                std::vector<float>& b) {
  a = random.normal(int64_t{n} * dim);
  b = random.normal(int64_t{n} * dim);
  for (int i = 0; i < n; ++i) {
    float* x = &a[i * dim];
    float* y = &b[i * dim];
    const double size = std::sqrt(dot(x, x, dim));
    for (int d = 0; d < dim; ++d) x[d] = static_cast<float>(x[d] / size);
    const double along = dot(x, y, dim);
    for (int d = 0; d < dim; ++d) y[d] = static_cast<float>(y[d] - along * x[d]);
    const double rest = std::sqrt(dot(y, y, dim));
    for (int d = 0; d < dim; ++d) {
      y[d] = static_cast<float>(rho * x[d] + std::sqrt(1 - rho * rho) * y[d] / rest);
    }
  }
}

// Estimated inner products of queries with encoded keys, both [n][dim].
std::vector<double> estimates(const Codec& codec, const std::vector<float>& keys,
                              std::vector<float> queries) {
  const int dim = codec.head_dim(), n = static_cast<int>(keys.size()) / dim;
  std::vector<uint8_t> block(codec.block_bytes());
  std::vector<float> y(kBlockTokens * dim);
  std::vector<double> scores;
  codec.transform_query(0, queries.data(), n);
  for (int first = 0; first < n; first += kBlockTokens) {
    const int count = std::min(kBlockTokens, n - first);
    codec.encode_block(Backend::cpu, {}, &keys[first * dim], count, block.data());
    codec.decode_block(Backend::cpu, {}, block.data(), count, y.data(), dim);
    for (int t = 0; t < count; ++t) {
      scores.push_back(dot(&queries[(first + t) * dim], &y[t * dim], dim));
    }
  }
  return scores;
}

// E<o_bar, o> = sqrt(D / pi) 2 Gamma(D/2) / ((D - 1) Gamma((D-1)/2)) (ALGORITHMS 4.1).
TEST(Theory, AlignmentOfSignsWithTheToken) {
  Random random(31);
  const std::pair<int, double> expected[] = {
      {64, .80101}, {80, .80038}, {96, .79997}, {128, .79944}, {256, .79866}};
  for (auto [dim, value] : expected) {
    double sum = 0;
    const int n_blocks = 1500;
    std::vector<uint8_t> planes(rabitq::plane_bytes(dim, 1));
    float squares[64], dots[64], levels[64];
    for (int i = 0; i < n_blocks; ++i) {
      const std::vector<float> y = random.normal(dim * 64);
      rabitq::cpu_levels().encode(y.data(), dim, 1, planes.data(), squares, dots, levels);
      for (int t = 0; t < 64; ++t) sum += dots[t] / std::sqrt(double(squares[t]) * dim);
    }
    EXPECT_NEAR(sum / (64 * n_blocks), value, 5e-4) << dim;
  }
}

// Unbiased scores: the slope of estimate on truth is 1, and the variance at rho = 0 is that of the
// identity d Var = (1 - c^2) / c^2 * d / (d - 1) with the mean cosines c of
// StepSearchIsNearTheFullSweep (ALGORITHMS 0.2; its simulated .560 .127 .035 .0098 of 0.3 are up to
// 5 % lower).
TEST(Theory, SlopeAndVarianceAtEveryWidth) {
  Random random(32);
  const int dim = 128, n = 20000;
  const double variance[] = {0, .571, .1323, .0368, .0102};
  for (int bits = 1; bits <= 4; ++bits) {
    const CodecPtr codec = make(dim, bits);
    std::vector<float> keys, queries;
    unit_pairs(random, n, dim, 0.0, keys, queries);
    double squares = 0;
    for (double e : estimates(*codec, keys, queries)) squares += e * e;
    EXPECT_NEAR(dim * squares / n, variance[bits], 0.05 * variance[bits]) << bits;
    unit_pairs(random, n, dim, 0.5, keys, queries);
    double sum = 0;
    for (double e : estimates(*codec, keys, queries)) sum += e;
    EXPECT_NEAR(sum / n / 0.5, 1.0, 0.005) << bits;
  }
}

TEST(Theory, ErrorBoundCovers) {
  Random random(33);
  const int n = 20000;
  for (int dim : {64, 128}) {
    const CodecPtr codec = make(dim, 1);
    std::vector<float> keys, queries;
    unit_pairs(random, n, dim, 0.3, keys, queries);
    const std::vector<double> scores = estimates(*codec, keys, queries);
    // <o_bar, o> of each key, from the decoded token: |k|^2 / <k, k^> = 1 and |k^| = 1 / <o_bar,
    // o>.
    int covered = 0;
    std::vector<float> rotated = keys;
    codec->forward(0, rotated.data(), n);
    for (int i = 0; i < n; ++i) {
      double l1 = 0;
      for (int d = 0; d < dim; ++d) l1 += std::abs(rotated[i * dim + d]);
      const double alignment = l1 / std::sqrt(double(dim));
      const double bound = std::sqrt((1 - alignment * alignment) / (alignment * alignment)) * 1.9 /
                           std::sqrt(dim - 1);
      covered += std::abs(scores[i] - 0.3) <= bound;
    }
    EXPECT_GE(covered / double(n), 0.94) << dim;
  }
}

// The nine steps that are tried come within 1.5e-4 of the cosine of a full sweep over all steps.
TEST(Theory, StepSearchIsNearTheFullSweep) {
  Random random(34);
  const double full[] = {0, 0, .94021, .98226, .99504};  // 1500 Gaussian vectors, D = 128
  const int dim = 128;
  for (int bits = 2; bits <= 4; ++bits) {
    std::vector<uint8_t> planes(rabitq::plane_bytes(dim, bits));
    float squares[64], dots[64], levels[64];
    double sum = 0;
    for (int i = 0; i < 100; ++i) {
      const std::vector<float> y = random.normal(dim * 64);
      rabitq::cpu_levels().encode(y.data(), dim, bits, planes.data(), squares, dots, levels);
      for (int t = 0; t < 64; ++t) {
        sum += dots[t] / std::sqrt(double(squares[t]) * double(levels[t]));
      }
    }
    EXPECT_NEAR(sum / 6400, full[bits], bits == 2 ? 4e-4 : 2e-4) << bits;
  }
}

TEST(Theory, ScalesDoWhatTheirNamesSay) {
  Random random(35);
  const int dim = 64;
  for (int bits = 1; bits <= 4; ++bits) {
    const std::vector<float> k = random.normal(dim);
    std::vector<double> slope, error, norm;
    for (RabitqScale scale :
         {RabitqScale::unbiased, RabitqScale::reconstruction, RabitqScale::norm}) {
      const CodecPtr codec = make(dim, bits, scale);
      std::vector<uint8_t> block(codec->block_bytes());
      std::vector<float> back(dim);
      codec->encode_block(Backend::cpu, {}, k.data(), 1, block.data());
      codec->decode_block(Backend::cpu, {}, block.data(), 1, back.data(), dim);
      codec->inverse(0, back.data(), 1);
      double squares = 0;
      for (int d = 0; d < dim; ++d) squares += (back[d] - k[d]) * (back[d] - k[d]);
      slope.push_back(dot(back.data(), k.data(), dim) / dot(k.data(), k.data(), dim));
      error.push_back(squares);
      norm.push_back(dot(back.data(), back.data(), dim) / dot(k.data(), k.data(), dim));
    }
    EXPECT_NEAR(slope[0], 1.0, 1e-3);
    EXPECT_NEAR(norm[2], 1.0, 2e-3);
    EXPECT_LE(error[1], error[0] * (1 + 1e-3));
    EXPECT_LE(error[1], error[2] * (1 + 1e-3));
  }
}

// Tokens aimed at the decisions: zeros of both signs, denormals, one ulp around every edge between
// two levels.
std::vector<float> boundary_tile(Random& random, int rows, int bits) {
  std::vector<float> y = random.normal(rows * 64);
  const float specials[] = {0.0f,       -0.0f,   kTiny,    -kTiny,   kDenormal,
                            -kDenormal, FLT_MIN, -FLT_MIN, 65504.0f, -65504.0f};
  for (int t = 0; t < 64; ++t) {
    if (t % 4 == 0) {
      for (int r = 0; r < rows; r += 1 + t / 8) {
        y[r * 64 + t] = specials[random.next() % std::size(specials)];
      }
    } else if (bits > 1 && t % 4 == 1) {
      // The step depends on the token: edges of the step of the token as it was.
      float squares = 0;
      for (int r = 0; r < rows; ++r) squares += y[r * 64 + t] * y[r * 64 + t];
      const float factor = kStepFactors[random.next() % kStepTrials];
      const float step =
          std::sqrt(squares / static_cast<float>(rows)) / (kInverseStep[bits] * factor);
      for (int r = 0; r < rows; ++r) {
        float edge = step * static_cast<float>(random.next() % (1u << (bits - 1)));
        for (int ulps = static_cast<int>(random.next() % 5) - 2; ulps != 0;) {
          edge = std::nextafter(edge, ulps > 0 ? 1e9f : -1e9f);
          ulps += ulps > 0 ? -1 : 1;
        }
        y[r * 64 + t] = random.next() % 2 ? edge : -edge;
      }
    } else if (t % 4 == 2) {
      for (int r = 0; r < rows; ++r) y[r * 64 + t] *= 1e-18f;  // squares underflow
    }
  }
  for (int r = 0; r < rows; ++r) y[r * 64 + 63] = 0.0f;
  return y;
}

class EveryLevel : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { set_simd_level(GetParam()); }
  void TearDown() override { set_simd_level(""); }
};

TEST_P(EveryLevel, KernelsEqualTheReferenceAtTheBoundaries) {
  Random random(36);
  for (int rows : {1, 8, 16, 48, 64, 80, 96, 128, 256}) {
    for (int bits = 1; bits <= 4; ++bits) {
      for (int trial = 0; trial < 5; ++trial) {
        const std::vector<float> y = boundary_tile(random, rows, bits);
        std::vector<uint8_t> expected(rabitq::plane_bytes(rows, bits), 0xaa), planes(expected);
        float sums[2][3][64];
        rabitq::reference_levels().encode(y.data(), rows, bits, expected.data(), sums[0][0],
                                          sums[0][1], sums[0][2]);
        rabitq::cpu_levels().encode(y.data(), rows, bits, planes.data(), sums[1][0], sums[1][1],
                                    sums[1][2]);
        ASSERT_EQ(planes, expected) << rows << " rows, " << bits << " bits";
        ASSERT_EQ(0, std::memcmp(sums[0], sums[1], sizeof(sums[0]))) << rows << " " << bits;

        const std::vector<float> scale = random.normal(64), mean = random.normal(rows);
        std::vector<float> y0(rows * 64), y1(rows * 64);
        for (const float* s : {static_cast<const float*>(nullptr), scale.data()}) {
          for (const float* m : {static_cast<const float*>(nullptr), mean.data()}) {
            rabitq::reference_levels().decode(planes.data(), rows, bits, s, m, y0.data());
            rabitq::cpu_levels().decode(planes.data(), rows, bits, s, m, y1.data());
            ASSERT_EQ(0, std::memcmp(y0.data(), y1.data(), y0.size() * 4)) << rows << " " << bits;
          }
        }
      }
    }
  }
}

TEST_P(EveryLevel, BlocksAndDecodedBitsEqualTheReference) {
  Random random(37);
  for (int dim : {8, 16, 48, 64, 80, 96, 128, 256}) {
    for (int bits = 1; bits <= 4; ++bits) {
      const std::vector<float> mean = random.normal(2 * dim);
      RabitqOptions options;
      options.bits = bits;
      if (bits % 2 == 0) options.mean = TensorView(mean.data(), DType::float32, {2, dim});
      const CodecPtr codec = make_rabitq_codec(Side::keys, 2, dim, options);
      for (int n_tokens : {1, 31, 63, 64}) {
        const BlockPlace place{0, n_tokens % 2, 0};
        const std::vector<float> x = random.normal(n_tokens * dim);
        std::vector<uint8_t> expected(codec->block_bytes(), 0xaa), block(expected);
        codec->encode_block(Backend::reference, place, x.data(), n_tokens, expected.data());
        codec->encode_block(Backend::cpu, place, x.data(), n_tokens, block.data());
        ASSERT_EQ(block, expected) << dim << " " << bits;
        std::vector<float> y[2], y_t[2];
        for (int i = 0; i < 2; ++i) {
          const Backend backend = i == 0 ? Backend::reference : Backend::cpu;
          y[i].resize(64 * (dim + 3));
          y_t[i].assign(64 * dim, NAN);
          codec->decode_block(backend, place, block.data(), n_tokens, y[i].data(), dim + 3);
          codec->decode_block_transposed(backend, place, block.data(), n_tokens, y_t[i].data());
        }
        ASSERT_EQ(0, std::memcmp(y[0].data(), y[1].data(), y[0].size() * 4));
        ASSERT_EQ(0, std::memcmp(y_t[0].data(), y_t[1].data(), y_t[0].size() * 4));
        for (int t = 0; t < 64; ++t) {
          for (int d = 0; d < dim; ++d) {
            const float want = t < n_tokens ? y[0][t * (dim + 3) + d] : 0.0f;
            ASSERT_EQ(y_t[0][d * 64 + t], want);
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Simd, EveryLevel, ::testing::ValuesIn(simd_levels()));

// A block of four tokens of eight ones: what every later version must read.
TEST(Format, GoldenBlock) {
  std::vector<float> y(8 * 64, 0.0f);
  for (int r = 0; r < 8; ++r) {
    y[r * 64] = 1.0f;                           // ++++++++
    y[r * 64 + 1] = r % 2 == 0 ? 1.0f : -1.0f;  // +-+-+-+-
    y[r * 64 + 2] = r < 4 ? -2.0f : 2.0f;       // ----++++
  }
  for (const auto* kernels : {&rabitq::reference_levels(), &rabitq::cpu_levels()}) {
    uint8_t planes[64];
    float squares[64], dots[64], levels[64];
    kernels->encode(y.data(), 8, 1, planes, squares, dots, levels);
    rabitq::clear_tokens_from(3, 8, planes);
    const uint8_t golden[] = {3, 1, 3, 1, 7, 5, 7, 5};
    for (int r = 0; r < 8; ++r) {
      EXPECT_EQ(planes[r * 8], golden[r]);
      for (int b = 1; b < 8; ++b) EXPECT_EQ(planes[r * 8 + b], 0);
    }
    EXPECT_EQ(squares[2], 32.0f);
    EXPECT_EQ(dots[2], 16.0f);
    EXPECT_EQ(levels[2], 8.0f);
  }
}

TEST(Format, BytesAndInterchange) {
  Random random(38);
  const int bytes_at_128[] = {0, 18, 34, 50, 66};  // ALGORITHMS section 7
  for (int bits = 1; bits <= 4; ++bits) {
    EXPECT_EQ(make(128, bits)->block_bytes(), 64 * bytes_at_128[bits]);
    EXPECT_EQ(make(128, bits)->token_bytes(), bytes_at_128[bits]);
    for (int dim : {8, 24, 80, 128}) {
      const CodecPtr codec = make(dim, bits);
      const std::vector<float> x = random.normal(64 * dim);
      for (int n : {1, 7, 64}) {
        std::vector<uint8_t> block(codec->block_bytes()), again(codec->block_bytes(), 0x77);
        std::vector<uint8_t> rows(n * codec->token_bytes(), 0x77);
        codec->encode_block(Backend::cpu, {}, x.data(), n, block.data());
        codec->unpack_tokens(block.data(), n, rows.data());
        codec->pack_tokens(rows.data(), n, again.data());
        EXPECT_EQ(again, block) << dim << " " << bits << " " << n;
      }
    }
  }
}

TEST(Format, ScalarsThatAreNotFiniteAreNotKept) {
  const CodecPtr codec = make(8, 1);
  for (uint16_t bad : {0x7c00, 0xfc00, 0x7e01, 0xffff}) {
    uint8_t row[3] = {0xff, static_cast<uint8_t>(bad), static_cast<uint8_t>(bad >> 8)};
    std::vector<uint8_t> block(codec->block_bytes());
    codec->pack_tokens(row, 1, block.data());
    std::vector<float> y(8);
    codec->decode_block(Backend::cpu, {}, block.data(), 1, y.data(), 8);
    for (float v : y) EXPECT_TRUE(std::isfinite(v)) << bad;
  }
}

TEST(Tokens, ZerosConstantsAndExtremesStayFinite) {
  for (int bits = 1; bits <= 4; ++bits) {
    for (float value : {0.0f, -0.0f, kTiny, kDenormal, 1.0f, 65504.0f, -65504.0f, 1e18f}) {
      for (bool one_hot : {false, true}) {
        const CodecPtr codec = make(64, bits);
        std::vector<float> x(64, one_hot ? 0.0f : value), y(64);
        x[7] = value;
        std::vector<uint8_t> block(codec->block_bytes());
        codec->encode_block(Backend::cpu, {}, x.data(), 1, block.data());
        codec->decode_block(Backend::cpu, {}, block.data(), 1, y.data(), 64);
        codec->inverse(0, y.data(), 1);
        for (float v : y) EXPECT_TRUE(std::isfinite(v)) << value;
        if (value == 0.0f) {
          for (float v : y) EXPECT_EQ(v, 0.0f);
        }
      }
    }
  }
}

TEST(Tokens, MeanIsAddedBack) {
  Random random(39);
  const int dim = 64;
  std::vector<float> mean = random.normal(3 * dim);
  for (float& m : mean) m *= 10;
  RabitqOptions options;
  options.mean = TensorView(mean.data(), DType::float32, {3, dim});
  const CodecPtr with = make_rabitq_codec(Side::keys, 3, dim, options);
  options.mean = {};
  const CodecPtr without = make_rabitq_codec(Side::keys, 3, dim, options);
  for (int h = 0; h < 3; ++h) {
    std::vector<float> x = random.normal(64 * dim);
    for (int i = 0; i < 64 * dim; ++i) x[i] += mean[h * dim + i % dim];
    double error[2] = {0, 0};
    for (const CodecPtr& codec : {with, without}) {
      std::vector<uint8_t> block(codec->block_bytes());
      std::vector<float> y(64 * dim);
      codec->encode_block(Backend::cpu, {0, h, 0}, x.data(), 64, block.data());
      codec->decode_block(Backend::cpu, {0, h, 0}, block.data(), 64, y.data(), dim);
      codec->inverse(h, y.data(), 64);
      for (int i = 0; i < 64 * dim; ++i) error[codec == without] += std::pow(y[i] - x[i], 2.0);
    }
    EXPECT_LT(error[0], 0.05 * error[1]);
  }
}

TEST(Codec, RefusesWhatDoesNotFit) {
  EXPECT_THROW(make(63, 1), Error);
  EXPECT_THROW(make(0, 1), Error);
  EXPECT_THROW(make(2048, 1), Error);
  EXPECT_THROW(make(64, 0), Error);
  EXPECT_THROW(make(64, 5), Error);
  EXPECT_THROW(make(64, 1, RabitqScale::unbiased, 0), Error);
  std::vector<float> mean(64, 0.0f);
  RabitqOptions options;
  options.mean = TensorView(mean.data(), DType::float32, {1, 32});
  EXPECT_THROW(make_rabitq_codec(Side::keys, 1, 64, options), Error);
  mean[3] = NAN;
  options.mean = TensorView(mean.data(), DType::float32, {1, 64});
  EXPECT_THROW(make_rabitq_codec(Side::keys, 1, 64, options), Error);
  auto spec = [](std::map<std::string, CodecOption> options) {
    return make_codec({"rabitq", Side::keys, 2, 64, std::move(options)}, {});
  };
  EXPECT_EQ(spec({{"bits", int64_t{2}}, {"scale", "norm"}, {"seed", int64_t{9}}})->name(),
            "rabitq 2-bit");
  EXPECT_THROW(spec({}), Error);
  EXPECT_THROW(spec({{"bits", int64_t{5}}}), Error);
  EXPECT_THROW(spec({{"bits", int64_t{1}}, {"scale", "raw"}}), Error);
  EXPECT_THROW(spec({{"bits", int64_t{1}}, {"rounds", int64_t{1}}}), Error);
}

}  // namespace
}  // namespace veloxquant
