// QJL: the estimator's mean and variance, the same bits on every SIMD level, the format, the
// published functions.
#include <gtest/gtest.h>

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "src/codecs/qjl/kernels.h"
#include "src/math/float16.h"
#include "tests/support/random.h"
#include "veloxquant/codec_spec.h"
#include "veloxquant/qjl.h"

namespace veloxquant {
namespace {

using test::Random;

double dot(const float* a, const float* b, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += double(a[i]) * b[i];
  return sum;
}

CodecPtr make(int dim, int m, int outliers = 0, uint64_t seed = 3) {
  QjlOptions options;
  options.sketch_bits = m;
  options.outliers = outliers;
  options.seed = seed;
  return make_qjl_codec(2, dim, options);
}

// sqrt(pi/2) / m |k| <S q, sign(S k)>, in double.
double estimate(const std::vector<float>& sketch, int m, int dim, const float* q, const float* k) {
  double sum = 0;
  for (int j = 0; j < m; ++j) {
    const double sign = dot(&sketch[j * dim], k, dim) >= 0 ? 1 : -1;
    sum += sign * dot(&sketch[j * dim], q, dim);
  }
  return qjl::kRootHalfPi / m * std::sqrt(dot(k, k, dim)) * sum;
}

// q of length 1 with <q, k> = rho for a unit k.
void unit_pair(Random& random, int dim, double rho, std::vector<float>& q, std::vector<float>& k) {
  q = random.normal(dim);
  k = random.normal(dim);
  double size = std::sqrt(dot(k.data(), k.data(), dim));
  for (float& v : k) v = static_cast<float>(v / size);
  const double along = dot(q.data(), k.data(), dim);
  for (int d = 0; d < dim; ++d) q[d] = static_cast<float>(q[d] - along * k[d]);
  size = std::sqrt(dot(q.data(), q.data(), dim));
  for (int d = 0; d < dim; ++d) {
    q[d] = static_cast<float>(rho * k[d] + std::sqrt(1 - rho * rho) * q[d] / size);
  }
}

struct Moments {
  double mean = 0, variance = 0;
};

// Of the scores of one codec per pair: `make_codec(i)`.
template <class MakeCodec>
Moments score_moments(Random& random, int dim, double rho, int n, const MakeCodec& make_codec) {
  double sum = 0, squares = 0;
  std::vector<float> q, k, back(dim);
  for (int i = 0; i < n; ++i) {
    unit_pair(random, dim, rho, q, k);
    const CodecPtr codec = make_codec(i);
    std::vector<uint8_t> block(codec->block_bytes());
    codec->encode_block(Backend::cpu, {}, k.data(), 1, block.data());
    codec->decode_block(Backend::cpu, {}, block.data(), 1, back.data(), dim);
    codec->transform_query(0, q.data(), 1);
    const double score = dot(q.data(), back.data(), dim);
    sum += score;
    squares += (score - rho) * (score - rho);
  }
  return {sum / n, squares / n};
}

// T5. d Var is 1.57 for Gaussian rows (exactly pi/2 - rho^2 at m = d) and .573 for orthogonal ones,
// whose mean is 1.002 rho at d = 128 (sqrt(pi/2) times E <o_bar, o> = .79944).
TEST(Theory, MeanAndVarianceOfBothSketches) {
  const int dim = 128, n = 4000;
  Random random(41);
  std::vector<float> gaussian = random.normal(dim * dim);
  for (double rho : {0.0, 0.5}) {
    const Moments orthogonal =
        score_moments(random, dim, rho, n, [&](int i) { return make(dim, dim, 0, 100 + i); });
    const Moments dense = score_moments(random, dim, rho, n, [&](int i) {
      if (i % 16 == 0) gaussian = random.normal(dim * dim);
      QjlOptions options;
      options.sketch = TensorView(gaussian.data(), DType::float32, {dim, dim});
      return make_qjl_codec(2, dim, options);
    });
    EXPECT_NEAR(orthogonal.mean, 1.00195 * rho, 3 * std::sqrt(orthogonal.variance / n)) << rho;
    EXPECT_NEAR(dense.mean, rho, 3 * std::sqrt(dense.variance / n)) << rho;
    if (rho > 0) continue;
    EXPECT_NEAR(dim * orthogonal.variance, .573, .06 * .573);
    EXPECT_NEAR(dim * dense.variance, 1.57, .06 * 1.57);
  }
}

TEST(Theory, TwoBlocksHalveTheVariance) {
  Random random(42);
  const Moments two =
      score_moments(random, 128, 0.0, 3000, [&](int i) { return make(128, 256, 0, 100 + i); });
  EXPECT_NEAR(128 * two.variance, .286, .08 * .286);
}

// One large channel makes one-hot keys, on which a single sign + Hadamard round is worthless.
TEST(Theory, OutliersAndOneHotKeysStayUnbiased) {
  Random random(43);
  const int dim = 64, n = 3000;
  for (int outliers : {0, 2}) {
    double truth = 0, error = 0, sum = 0;
    for (int i = 0; i < n; ++i) {
      const CodecPtr codec = make(dim, dim, outliers, 500 + i);
      std::vector<float> q = random.normal(dim), k = random.normal(dim), back(dim);
      k[5] += 30;
      q[5] += 2;
      std::vector<uint8_t> block(codec->block_bytes());
      codec->encode_block(Backend::cpu, {}, k.data(), 1, block.data());
      codec->decode_block(Backend::cpu, {}, block.data(), 1, back.data(), dim);
      truth = dot(q.data(), k.data(), dim);
      codec->transform_query(0, q.data(), 1);
      const double difference = dot(q.data(), back.data(), dim) - truth;
      sum += difference;
      error += difference * difference;
    }
    EXPECT_LE(std::abs(sum / n), 3 * std::sqrt(error / n / n) + 0.005 * 60) << outliers;
  }
}

// Decoded keys give the estimator's scores, whatever coordinates the codec works in.
TEST(Scores, AreTheEstimatorsExactly) {
  Random random(44);
  for (int dim : {16, 48, 64, 80, 128}) {
    for (int blocks : {1, 2, 3}) {
      const int m = blocks * dim;
      std::vector<float> sketch(m * dim);
      qjl_sketch(dim, m, 3, sketch.data());
      for (bool given : {false, true}) {
        QjlOptions options;
        options.seed = 3;
        options.sketch_bits = m;
        if (given) options.sketch = TensorView(sketch.data(), DType::float32, {m, dim});
        const CodecPtr codec = make_qjl_codec(2, dim, options);
        std::vector<float> keys = random.normal(64 * dim), q = random.normal(dim), y(64 * dim);
        std::vector<float> moved = q;
        std::vector<uint8_t> block(codec->block_bytes());
        codec->encode_block(Backend::cpu, {}, keys.data(), 64, block.data());
        codec->decode_block(Backend::cpu, {}, block.data(), 64, y.data(), dim);
        codec->transform_query(1, moved.data(), 1);
        for (int t = 0; t < 64; ++t) {
          const double score = dot(moved.data(), &y[t * dim], dim);
          const double size =
              std::sqrt(dot(q.data(), q.data(), dim) * dot(&keys[t * dim], &keys[t * dim], dim));
          // The norm is rounded to fp16; a projection within rounding of 0 may count either way.
          EXPECT_NEAR(score, estimate(sketch, m, dim, q.data(), &keys[t * dim]), 1e-3 * size)
              << dim << " " << m << " " << given;
        }
      }
    }
  }
}

TEST(Sketch, BlocksAreOrthogonalAndIndependent) {
  for (int dim : {48, 64, 128}) {
    std::vector<float> s(2 * dim * dim), other(s.size());
    qjl_sketch(dim, 2 * dim, 7, s.data());
    qjl_sketch(dim, 2 * dim, 8, other.data());
    double cross = 0, between = 0;
    for (int i = 0; i < dim; ++i) {
      for (int j = 0; j < dim; ++j) {
        const double want = i == j ? dim : 0;
        EXPECT_NEAR(dot(&s[i * dim], &s[j * dim], dim), want, 1e-4 * dim);
        cross += std::pow(dot(&s[i * dim], &s[(dim + j) * dim], dim), 2.0);
        between += std::pow(dot(&s[i * dim], &other[j * dim], dim), 2.0);
      }
    }
    // Squared products of independent rows are dim on average.
    EXPECT_NEAR(cross / dim / dim / dim, 1.0, 0.05);
    EXPECT_NEAR(between / dim / dim / dim, 1.0, 0.05);
  }
}

class EveryLevel : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { set_simd_level(GetParam()); }
  void TearDown() override { set_simd_level(""); }
};

// Zeros of both signs, denormals, and keys orthogonal to rows of the sketch but for an ulp.
void aim(Random& random, std::vector<float>& x) {
  const float specials[] = {0.0f, -0.0f, 1e-40f,   -1e-40f, FLT_TRUE_MIN,
                            1.0f, -1.0f, 65504.0f, FLT_MIN, 1.0000001f};
  for (float& v : x) {
    if (random.next() % 3 == 0) v = specials[random.next() % std::size(specials)];
  }
}

TEST_P(EveryLevel, BlocksAndDecodedBitsEqualTheReference) {
  Random random(45);
  for (int dim : {8, 16, 48, 64, 80, 96, 128, 256}) {
    const std::vector<float> sketch = random.normal(40 * dim);
    for (int kind = 0; kind < 5; ++kind) {
      QjlOptions options;
      options.sketch_bits = kind == 1 ? 2 * dim : dim;
      options.outliers = kind >= 2 ? 3 : 0;
      const int32_t channels[] = {4, 0, 7, 1, 2, 3};
      if (kind == 3) options.outlier_channels = TensorView(channels, DType::int32, {2, 3});
      if (kind == 4) {
        options.sketch_bits = 0;
        options.outlier_bits = 16;
        options.sketch = TensorView(sketch.data(), DType::float32, {40, dim});
      }
      const CodecPtr codec = make_qjl_codec(2, dim, options);
      for (int n_tokens : {1, 31, 63, 64}) {
        const BlockPlace place{0, n_tokens % 2, 0};
        std::vector<float> x = random.normal(n_tokens * dim);
        aim(random, x);
        std::vector<uint8_t> expected(codec->block_bytes(), 0xaa), block(expected);
        codec->encode_block(Backend::reference, place, x.data(), n_tokens, expected.data());
        codec->encode_block(Backend::cpu, place, x.data(), n_tokens, block.data());
        ASSERT_EQ(block, expected) << dim << " kind " << kind;
        std::vector<float> y[2], y_t[2];
        for (int i = 0; i < 2; ++i) {
          const Backend backend = i == 0 ? Backend::reference : Backend::cpu;
          y[i].resize(64 * dim);
          y_t[i].assign(64 * dim, NAN);
          codec->decode_block(backend, place, block.data(), n_tokens, y[i].data(), dim);
          codec->decode_block_transposed(backend, place, block.data(), n_tokens, y_t[i].data());
        }
        ASSERT_EQ(0, std::memcmp(y[0].data(), y[1].data(), y[0].size() * 4));
        ASSERT_EQ(0, std::memcmp(y_t[0].data(), y_t[1].data(), y_t[0].size() * 4));
        for (int t = n_tokens; t < 64; ++t) {
          for (int d = 0; d < dim; ++d) ASSERT_EQ(y_t[0][d * 64 + t], 0.0f);
        }
        std::vector<uint8_t> rows(n_tokens * codec->token_bytes()), again(block.size(), 0x77);
        codec->unpack_tokens(block.data(), n_tokens, rows.data());
        codec->pack_tokens(rows.data(), n_tokens, again.data());
        ASSERT_EQ(again, block) << dim << " kind " << kind;
      }
    }
  }
}

TEST_P(EveryLevel, EncodeEqualsTheReference) {
  const uint64_t seed = 46;
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  Random random(seed);
  const int n_calls = 100000 / static_cast<int>(simd_levels().size());
  for (int call = 0; call < n_calls; ++call) {
    const bool large = call % 200 == 0;
    const int dim = 1 + static_cast<int>(random.next() % (large ? 140 : 10));
    const int m = 8 * (1 + static_cast<int>(random.next() % (large ? 17 : 2)));
    const int n = static_cast<int>(random.next() % (large ? 200 : 10));
    std::vector<float> x = random.normal(n * dim), s = random.normal(m * dim);
    aim(random, x);
    aim(random, s);
    std::vector<uint8_t> signs[2];
    std::vector<uint16_t> norms[2];
    for (int i = 0; i < 2; ++i) {
      signs[i].assign(n * m / 8, 0x55);
      norms[i].assign(n, 0x5555);
      qjl_encode(i == 0 ? Backend::reference : Backend::cpu, x.data(), n, dim, s.data(), m,
                 signs[i].data(), norms[i].data());
    }
    ASSERT_EQ(signs[0], signs[1]) << call;
    ASSERT_EQ(norms[0], norms[1]) << call;
  }
}

INSTANTIATE_TEST_SUITE_P(Simd, EveryLevel, ::testing::ValuesIn(simd_levels()));

TEST(Encode, SignsNormsAndWhatIsNotFinite) {
  // S = identity on the first 8 dimensions: the bits are the signs of x.
  std::vector<float> s(64, 0.0f);
  for (int j = 0; j < 8; ++j) s[j * 8 + j] = 1.0f;
  const float inf = std::numeric_limits<float>::infinity();
  const float x[5][8] = {{1, -1, 0, -0.0f, 3, -2, 1e-40f, -1e-40f},
                         {NAN, -1, NAN, 1, 1, 1, 1, -1},
                         {inf, -inf, 1, 1, 1, 1, 1, 1},
                         {65504, 65504, 0, 0, 0, 0, 0, 0},
                         {0, 0, 0, 0, 0, 0, 0, 0}};
  uint8_t signs[5];
  uint16_t norms[5];
  qjl_encode(Backend::cpu, &x[0][0], 5, 8, s.data(), 8, signs, norms);
  EXPECT_EQ(signs[0], 0b01011101);
  EXPECT_EQ(signs[1], 0b01111101);  // NaN counts as 0
  EXPECT_EQ(signs[2], 0b11111101);
  EXPECT_EQ(signs[4], 0xff);
  EXPECT_EQ(f16_to_f32(norms[0]), f16_to_f32(f32_to_f16(std::sqrt(15.0f))));
  EXPECT_EQ(norms[2], 0x7bff);
  EXPECT_EQ(norms[3], 0x7bff);  // |x| = 92637: the largest fp16, not infinity
  EXPECT_EQ(norms[4], 0);
}

// 10^5 calls with sizes and strides at random, against the definition in double.
TEST(InnerProduct, FuzzedAgainstTheDefinition) {
  const uint64_t seed = 47;
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  Random random(seed);
  for (int call = 0; call < 100000; ++call) {
    QjlScores work;
    work.n_key_heads = 1 + static_cast<int>(random.next() % 3);
    work.n_query_heads = work.n_key_heads * (1 + static_cast<int>(random.next() % 2));
    work.m = 8 * (1 + static_cast<int>(random.next() % (call % 500 == 0 ? 40 : 3)));
    work.n_keys = static_cast<int64_t>(random.next() % 7);
    const int bytes = work.m / 8;
    work.sign_head_stride = bytes;
    work.sign_key_stride = bytes * work.n_key_heads;
    work.norm_head_stride = 1;
    work.norm_key_stride = work.n_key_heads;
    std::vector<float> queries(work.n_query_heads * work.m);
    for (float& q : queries) q = static_cast<float>(random.uniform() - 0.5);
    std::vector<uint8_t> signs(work.n_keys * work.sign_key_stride);
    for (uint8_t& s : signs) s = static_cast<uint8_t>(random.next());
    std::vector<float> norms(work.n_keys * work.n_key_heads);
    for (float& n : norms) n = static_cast<float>(random.uniform());
    std::vector<float> scores(work.n_query_heads * work.n_keys, NAN);
    work.queries = queries.data();
    work.signs = signs.data();
    work.norms = norms.data();
    work.scores = scores.data();
    qjl_inner_product(work);
    for (int h = 0; h < work.n_query_heads; ++h) {
      const int key_head = h * work.n_key_heads / work.n_query_heads;
      for (int i = 0; i < work.n_keys; ++i) {
        double sum = 0;
        for (int j = 0; j < work.m; ++j) {
          const uint8_t byte = signs[i * work.sign_key_stride + key_head * bytes + j / 8];
          sum += ((byte >> (j % 8)) & 1) ? queries[h * work.m + j] : -queries[h * work.m + j];
        }
        const double want =
            qjl::kRootHalfPi / work.m * norms[i * work.n_key_heads + key_head] * sum;
        ASSERT_NEAR(scores[h * work.n_keys + i], want, 2e-6) << "call " << call;
      }
    }
  }
}

TEST(Format, BytesPerToken) {
  EXPECT_EQ(make(128, 256)->block_bytes(), 64 * 34);  // ALGORITHMS section 7
  EXPECT_EQ(make(128, 256)->token_bytes(), 34);
  EXPECT_EQ(make(64, 64)->block_bytes(), 64 * 10);
  // The paper's general configuration but for its int8 indices, which are one set a block.
  EXPECT_EQ(make(128, 256, 8)->block_bytes(), 64 * (32 + 16 + 4) + 8);
  EXPECT_EQ(make(128, 256, 8)->token_bytes(), 32 + 16 + 4 + 8);
}

TEST(Format, RowsAndPlanesAreEachOthersInverse) {
  Random random(48);
  for (int m : {8, 64, 104}) {
    for (int n : {1, 7, 8, 33, 64}) {
      std::vector<uint8_t> rows(n * m / 8), back(rows.size()), planes(m * 8, 0);
      for (uint8_t& b : rows) b = static_cast<uint8_t>(random.next());
      rabitq::rows_to_planes(rows.data(), m / 8, m, n, planes.data());
      for (int t = 0; t < n; ++t) {
        for (int j = 0; j < m; ++j) {
          ASSERT_EQ((planes[j * 8 + t / 8] >> (t % 8)) & 1,
                    (rows[t * m / 8 + j / 8] >> (j % 8)) & 1);
        }
      }
      rabitq::planes_to_rows(planes.data(), m, n, back.data(), m / 8);
      EXPECT_EQ(back, rows);
    }
  }
}

TEST(Tokens, ZerosAndExtremesStayFinite) {
  for (int outliers : {0, 4}) {
    for (float value : {0.0f, -0.0f, 1e-40f, 65504.0f, 1e18f}) {
      const CodecPtr codec = make(64, 128, outliers);
      std::vector<float> x(64, value), y(64);
      std::vector<uint8_t> block(codec->block_bytes());
      codec->encode_block(Backend::cpu, {}, x.data(), 1, block.data());
      codec->decode_block(Backend::cpu, {}, block.data(), 1, y.data(), 64);
      for (float v : y) EXPECT_TRUE(std::isfinite(v)) << value;
      if (value == 0.0f) {
        for (float v : y) EXPECT_EQ(v, 0.0f);
      }
    }
  }
}

// A file may say anything: channels beyond the head are clamped, never followed.
TEST(Tokens, AnyBytesDecode) {
  const uint64_t seed = 49;
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  Random random(seed);
  const CodecPtr codec = make(16, 16, 5);
  std::vector<uint8_t> rows(64 * codec->token_bytes()), block(codec->block_bytes());
  std::vector<float> y(64 * 16);
  for (int call = 0; call < 3000; ++call) {
    for (uint8_t& b : rows) b = static_cast<uint8_t>(random.next());
    const int n = 1 + static_cast<int>(random.next() % 64);
    codec->pack_tokens(rows.data(), n, block.data());
    codec->decode_block(Backend::cpu, {}, block.data(), n, y.data(), 16);
    for (int i = 0; i < n * 16; ++i) ASSERT_TRUE(std::isfinite(y[i]));
  }
}

TEST(Codec, RefusesWhatDoesNotFit) {
  EXPECT_NO_THROW(make(64, 192));
  EXPECT_THROW(make(64, 0), Error);
  EXPECT_THROW(make(64, 65), Error);
  EXPECT_THROW(make(63, 63), Error);
  EXPECT_THROW(make(512, 512), Error);
  EXPECT_THROW(make(64, 64, -1), Error);
  EXPECT_THROW(make(64, 64, 65), Error);
  EXPECT_THROW(make(8, 8, 8), Error);
  std::vector<float> sketch(16 * 64, 1.0f);
  const int32_t channels[] = {1, 1, 0, 64};
  auto with = [&](auto change) {
    QjlOptions options;
    options.sketch_bits = 64;
    change(options);
    make_qjl_codec(2, 64, options);
  };
  EXPECT_THROW(with([&](QjlOptions& o) {
                 o.outliers = 2;
                 o.outlier_bits = 65;
               }),
               Error);
  EXPECT_THROW(with([&](QjlOptions& o) {
                 o.sketch = TensorView(sketch.data(), DType::float32, {16, 64});
               }),
               Error);
  EXPECT_THROW(with([&](QjlOptions& o) {
                 o.sketch_bits = 0;
                 o.sketch = TensorView(sketch.data(), DType::float32, {32, 32});
               }),
               Error);
  EXPECT_THROW(with([&](QjlOptions& o) {
                 o.outliers = 2;
                 o.outlier_channels = TensorView(channels, DType::int32, {2, 2});
               }),
               Error);
  EXPECT_THROW(with([&](QjlOptions& o) {
                 o.outlier_channels = TensorView(channels, DType::int32, {2, 2});
               }),
               Error);
  EXPECT_THROW(make_codec({"qjl", Side::values, 2, 64, {{"sketch_bits", int64_t{64}}}}, {}), Error);
  EXPECT_THROW(make_codec({"qjl", Side::keys, 2, 64, {{"bits", int64_t{64}}}}, {}), Error);
  EXPECT_EQ(
      make_codec(
          {"qjl", Side::keys, 2, 64, {{"sketch_bits", int64_t{128}}, {"outliers", int64_t{4}}}}, {})
          ->name(),
      "qjl m128 + 4 outliers m64");
}

}  // namespace
}  // namespace veloxquant
