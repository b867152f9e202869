// TurboQuant and the two-stage codec: bits equal on every level, distortion and bias as the theory
// says, clear errors.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "src/codecs/rotation.h"
#include "src/codecs/turboquant/kernels.h"
#include "src/codecs/turboquant/sketch.h"
#include "src/math/bitpack.h"
#include "tests/support/random.h"
#include "veloxquant/codec_spec.h"

namespace veloxquant {
namespace {

using test::Random;

CodecPtr turboquant(int dim, int bits, ScalarScale scale = ScalarScale::norm_corrected,
                    Side side = Side::keys, bool prod = false, uint64_t seed = 1) {
  TurboQuantOptions options;
  options.bits = bits;
  options.scale = prod ? ScalarScale::raw : scale;
  options.prod = prod;
  options.seed = seed;
  return make_turboquant_codec(side, 2, dim, options);
}

CodecPtr rvq(int dim, int bits, Side side = Side::keys, uint64_t seed = 1) {
  RvqOptions options;
  options.bits = bits;
  options.seed = seed;
  return make_rvq_codec(side, 2, dim, options);
}

std::vector<CodecPtr> all_codecs(int dim, Side side) {
  std::vector<CodecPtr> codecs;
  for (int bits = 1; bits <= 4; ++bits) {
    for (ScalarScale scale :
         {ScalarScale::norm_corrected, ScalarScale::raw, ScalarScale::unbiased}) {
      codecs.push_back(turboquant(dim, bits, scale, side));
    }
    codecs.push_back(rvq(dim, bits, side));
    codecs.push_back(turboquant(dim, bits, ScalarScale::raw, side, true));
  }
  return codecs;
}

void expect_levels_equal(const Codec& codec, const std::vector<float>& x, int n_tokens) {
  const int dim = codec.head_dim();
  std::vector<uint8_t> expected(codec.block_bytes(), 0xaa);
  codec.encode_block(Backend::reference, {}, x.data(), n_tokens, expected.data());
  std::vector<float> y(64 * dim), y_t(64 * dim);
  codec.decode_block(Backend::reference, {}, expected.data(), n_tokens, y.data(), dim);
  codec.decode_block_transposed(Backend::reference, {}, expected.data(), n_tokens, y_t.data());
  for (const std::string& level : simd_levels()) {
    set_simd_level(level);
    std::vector<uint8_t> block(codec.block_bytes(), 0x55);
    codec.encode_block(Backend::cpu, {}, x.data(), n_tokens, block.data());
    EXPECT_EQ(block, expected) << level << " " << codec.name() << " D " << dim;
    std::vector<float> z(64 * dim), z_t(64 * dim, NAN);
    codec.decode_block(Backend::cpu, {}, block.data(), n_tokens, z.data(), dim);
    codec.decode_block_transposed(Backend::cpu, {}, block.data(), n_tokens, z_t.data());
    EXPECT_EQ(0, std::memcmp(z.data(), y.data(), n_tokens * dim * 4)) << level << codec.name();
    EXPECT_EQ(0, std::memcmp(z_t.data(), y_t.data(), z_t.size() * 4)) << level << codec.name();
  }
  set_simd_level("");
  for (int t = 0; t < n_tokens; ++t) {
    for (int d = 0; d < dim; ++d) ASSERT_EQ(y[t * dim + d], y_t[d * 64 + t]) << codec.name();
  }
  for (float value : y) ASSERT_TRUE(std::isfinite(value)) << codec.name();
}

TEST(ScalarCodec, EveryLevelEqualsTheReferenceBitForBit) {
  Random random(7);
  for (int dim : {8, 16, 48, 64, 80, 96, 128, 256}) {
    for (Side side : {Side::keys, Side::values}) {
      for (const CodecPtr& codec : all_codecs(dim, side)) {
        for (int n_tokens : {1, 37, 64}) {
          expect_levels_equal(*codec, random.normal(n_tokens * dim), n_tokens);
        }
      }
    }
  }
}

// T12: zero tokens, constants, tokens at both ends of what 16 bits hold, and of what fp32 holds.
TEST(ScalarCodec, ExtremeTokensStayFiniteAndEqual) {
  Random random(8);
  const int dim = 64;
  std::vector<float> x(64 * dim, 0.0f);
  const float sizes[] = {0.0f, -0.0f, 1.0f, 65504.0f, 6e-8f, 1e-20f, 1e-30f, 1e-42f, 3e38f, -3e38f};
  for (int t = 0; t < 20; ++t) {
    for (int d = 0; d < dim; ++d) {
      x[t * dim + d] = t < 10 ? sizes[t] : mul(sizes[t - 10], random.normal() / 4);
    }
  }
  for (Side side : {Side::keys, Side::values}) {
    for (const CodecPtr& codec : all_codecs(dim, side)) expect_levels_equal(*codec, x, 64);
  }
  auto codec = turboquant(dim, 2);
  std::vector<uint8_t> block(codec->block_bytes());
  codec->encode_block(Backend::cpu, {}, x.data(), 64, block.data());
  std::vector<float> y(64 * dim);
  codec->decode_block(Backend::cpu, {}, block.data(), 64, y.data(), dim);
  for (int d = 0; d < dim; ++d) {
    EXPECT_EQ(y[d], 0.0f);  // a zero token is zero
    EXPECT_EQ(y[63 * dim + d], 0.0f);
  }
}

// Within 2 ulp of every boundary, where a reordered comparison would choose differently.
TEST(ScalarCodec, BoundariesDecideAlikeOnEveryLevel) {
  for (int bits = 1; bits <= 4; ++bits) {
    for (int dim : {8, 32, 128}) {
      turboquant::RowEncoder encoder;
      encoder.n_stages = 2;
      encoder.stage[0] = scalar_quantizer(lloyd_max_levels(dim, bits), bits);
      encoder.stage[1] = scalar_quantizer(lloyd_max_residual_levels(dim, bits), bits);
      std::vector<float> u;
      const ScalarQuantizer& first = encoder.stage[0];
      auto around = [&](float value) {
        for (int ulp = -2; ulp <= 2; ++ulp) {
          float moved = value;
          for (int i = 0; i < std::abs(ulp); ++i)
            moved = std::nextafter(moved, ulp < 0 ? -9.0f : 9.0f);
          u.push_back(moved);
          u.push_back(-moved);
        }
      };
      for (int k = 0; k < 1 << (bits - 1); ++k) {
        around(first.boundary[k]);
        for (int j = 0; j < 1 << (bits - 1); ++j) {
          around(first.level[k] + encoder.stage[1].boundary[j]);
          around(first.level[k] - encoder.stage[1].boundary[j]);
        }
      }
      u.push_back(NAN);
      u.push_back(-INFINITY);
      // A row of norm sqrt(dim) has factor 1 only nearly: rows are scaled so that it is exact.
      const int n = static_cast<int>(u.size());
      encoder.dim = n;
      for (ScalarScale scale : {ScalarScale::norm_corrected, ScalarScale::unbiased}) {
        encoder.scale = scale;
        std::vector<uint8_t> expected(2 * n), codes(2 * n);
        std::vector<float> left(n), left_reference(n);
        uint16_t scalar = 0, scalar_reference = 0;
        std::vector<float> x(u.begin(), u.end() - 2);  // finite: one row
        x.resize(n, 0.25f);
        // unit_factor = sqrt(n) / |x|: make the norm exactly sqrt(n) by searching the last entry.
        turboquant::reference_kernels().encode_rows(encoder, x.data(), 1, expected.data(), n,
                                                    &scalar_reference, left_reference.data());
        for (const std::string& level : simd_levels()) {
          set_simd_level(level);
          turboquant::cpu_kernels().encode_rows(encoder, x.data(), 1, codes.data(), n, &scalar,
                                                left.data());
          EXPECT_EQ(codes, expected) << level << " " << bits;
          EXPECT_EQ(scalar, scalar_reference) << level << " " << bits;
          EXPECT_EQ(0, std::memcmp(left.data(), left_reference.data(), 4 * n)) << level;
        }
        set_simd_level("");
      }
    }
  }
}

// Rows whose factor is exactly 1: D = 16, norm 4, so that x is u and a boundary is met exactly.
TEST(ScalarCodec, ValuesOnABoundaryGoAwayFromZero) {
  for (int bits = 1; bits <= 4; ++bits) {
    turboquant::RowEncoder encoder;
    encoder.dim = 16;
    encoder.stage[0] = scalar_quantizer(lloyd_max_levels(128, bits), bits);
    const int half = 1 << (bits - 1);
    for (int k = 0; k < half; ++k) {
      for (int ulp = -2; ulp <= 2; ++ulp) {
        float value = encoder.stage[0].boundary[k];
        for (int i = 0; i < std::abs(ulp); ++i)
          value = std::nextafter(value, ulp < 0 ? -9.0f : 9.0f);
        // Twice the value and its negation; the rest of the norm in one entry, whose square is
        // searched for until the sum is exactly 16.
        std::vector<float> x(16, 0.0f);
        x[0] = value;
        x[1] = -value;
        x[2] = -0.0f;
        float rest = std::sqrt(16.0f - 2 * value * value);
        bool exact = false;
        for (int step = -40; step <= 40 && !exact; ++step) {
          x[15] = rest + step * (std::nextafter(rest, 9.0f) - rest);
          double sum = 0;
          for (float v : x) sum += double(v) * v;
          exact = std::sqrt(static_cast<float>(sum)) == 4.0f;
        }
        ASSERT_TRUE(exact);
        for (Backend backend : {Backend::reference, Backend::cpu}) {
          std::vector<uint8_t> codes(16);
          uint16_t scalar;
          turboquant::kernels_of(backend).encode_rows(encoder, x.data(), 1, codes.data(), 16,
                                                      &scalar, nullptr);
          const bool above = value >= encoder.stage[0].boundary[k];
          const bool negative = k == 0 && ulp < 0;
          const int size = negative ? 0 : above ? k : k - 1;
          EXPECT_EQ(codes[0], negative ? half - 1 - size : half + size) << bits << k << ulp;
          EXPECT_EQ(codes[1], negative || value == 0 ? half + size : half - 1 - size)
              << bits << k << ulp;
          EXPECT_EQ(codes[2], half);  // -0 counts as +0
        }
      }
    }
  }
}

// Mean over a block's 64 tokens of the squared error over the squared length.
double distortion(const Codec& codec, const std::vector<float>& x) {
  const int dim = codec.head_dim();
  std::vector<float> y(x.size());
  std::vector<uint8_t> packed(codec.block_bytes());
  codec.encode_block(Backend::cpu, {}, x.data(), 64, packed.data());
  codec.decode_block(Backend::cpu, {}, packed.data(), 64, y.data(), dim);
  codec.inverse(0, y.data(), 64);
  double mean = 0;
  for (int t = 0; t < 64; ++t) {
    double error = 0, size = 0;
    for (int i = t * dim; i < (t + 1) * dim; ++i) {
      error += std::pow(double(x[i]) - y[i], 2);
      size += double(x[i]) * x[i];
    }
    mean += error / size / 64;
  }
  return mean;
}

// T2: distortion of random unit vectors against the Beta values of ALGORITHMS 2.2, raw scale.
TEST(Distortion, EqualsTheTheoryAtEveryWidth) {
  Random random(21);
  const double expected[] = {.3609, .1160, .03397, .009315};
  const int dim = 128, blocks = 160;
  for (int bits = 1; bits <= 4; ++bits) {
    auto codec = turboquant(dim, bits, ScalarScale::raw);
    double error = 0;
    for (int block = 0; block < blocks; ++block) {
      error += distortion(*codec, random.normal(64 * dim)) / blocks;
    }
    EXPECT_NEAR(error, expected[bits - 1], .02 * expected[bits - 1]) << bits;
  }
}

// T9: the table of ALGORITHMS 2.7, second stage trained on the true residual.
TEST(Distortion, OfTwoStagesIsTheTrainedSecondStages) {
  Random random(22);
  const double expected[] = {.13045, .01965, .001944, .0001768};  // of N(0, 1), integrated
  const double tolerance[] = {.02, .02, .04, .08};  // of the sample: few tails decide the rest
  for (int bits = 1; bits <= 4; ++bits) {
    const ScalarQuantizer one = scalar_quantizer(lloyd_max_levels(128, bits), bits);
    const ScalarQuantizer two = scalar_quantizer(lloyd_max_residual_levels(128, bits), bits);
    double error = 0;
    const int n = 400000;
    for (int i = 0; i < n; ++i) {
      const float u = random.normal();
      const float rest = u - scalar_level(one, scalar_code(one, u));
      error += std::pow(double(rest) - scalar_level(two, scalar_code(two, rest)), 2);
    }
    EXPECT_NEAR(error / n, expected[bits - 1], tolerance[bits - 1] * expected[bits - 1]) << bits;
  }
}

// Adversarial inputs for a single Hadamard round (ALGORITHMS 2.5), also where D is no power of two.
TEST(Distortion, HoldsForOneHotAndHeavyTailedTokens) {
  Random random(23);
  for (int dim : {48, 64, 80, 96, 128}) {
    double error = 0;
    const int blocks = 60;
    for (int block = 0; block < blocks; ++block) {
      auto codec = turboquant(dim, 2, ScalarScale::raw, Side::values, false, 500 + block);
      std::vector<float> x(64 * dim, 0.0f);
      for (int t = 0; t < 64; ++t) {
        for (int d = 0; d < dim; ++d) x[t * dim + d] = 1e-3f * random.normal();
        x[t * dim + random.next() % dim] = t % 2 ? 5.0f : -3.0f;
      }
      error += distortion(*codec, x) / blocks;
    }
    // Haar: .1148 (D = 64) .. .1160 (128). One round of Hadamard: .142 and up to .30. Two rounds
    // make a sum of D signs of it, a lattice that is coarse for small D.
    EXPECT_GT(error, .110) << dim;
    EXPECT_LT(error, .130) << dim;
  }
}

struct Regression {
  double slope, variance;  // of <q, x^> on <q, x> for unit vectors; D * Var at <q, x> = 0
};

Regression regression(int dim, int n_blocks, const std::function<CodecPtr(int)>& codec_of) {
  Random random(31);
  double slope = 0, variance = 0, n = 0;
  for (int block = 0; block < n_blocks; ++block) {
    CodecPtr codec = codec_of(block);
    std::vector<float> x = random.normal(64 * dim), y(64 * dim);
    std::vector<uint8_t> packed(codec->block_bytes());
    codec->encode_block(Backend::cpu, {}, x.data(), 64, packed.data());
    codec->decode_block(Backend::cpu, {}, packed.data(), 64, y.data(), dim);
    codec->inverse(0, y.data(), 64);
    for (int t = 0; t < 64; ++t) {
      const float *k = &x[t * dim], *k_hat = &y[t * dim];
      double kk = 0, kh = 0;
      for (int d = 0; d < dim; ++d) {
        kk += double(k[d]) * k[d];
        kh += double(k[d]) * k_hat[d];
      }
      slope += kh / kk;
      // A unit query orthogonal to k.
      std::vector<float> q = random.normal(dim);
      double qk = 0, qq = 0, qh = 0;
      for (int d = 0; d < dim; ++d) qk += double(q[d]) * k[d];
      for (int d = 0; d < dim; ++d) {
        const double component = q[d] - qk / kk * k[d];
        qq += component * component;
        qh += component * k_hat[d];
      }
      variance += qh * qh / qq / kk;
      n += 1;
    }
  }
  return {slope / n, dim * variance / n};
}

// T3: slopes and variances of ALGORITHMS 0.2 and 0.3.
TEST(Scores, SlopesAndVariancesOfTheThreeScales) {
  const int dim = 128, blocks = 400;
  const double corrected[] = {.7972, .9394, .9826, .9952}, raw[] = {.6366, .8825, .9655, .9905};
  const double variance[] = {.571, .1331, .0358, .00959};
  for (int bits = 1; bits <= 4; ++bits) {
    auto with = [&](ScalarScale scale) {
      return regression(dim, blocks, [&, scale](int block) {
        return turboquant(dim, bits, scale, Side::keys, false, 100 + block);
      });
    };
    EXPECT_NEAR(with(ScalarScale::norm_corrected).slope, corrected[bits - 1], .005) << bits;
    EXPECT_NEAR(with(ScalarScale::raw).slope, raw[bits - 1], .005) << bits;
    const Regression unbiased = with(ScalarScale::unbiased);
    EXPECT_NEAR(unbiased.slope, 1.0, .005) << bits;
    EXPECT_NEAR(unbiased.variance, variance[bits - 1], .05 * variance[bits - 1]) << bits;
  }
}

// T4: D_prod(b) = pi / (2 d) D_mse(b - 1), and no bias.
TEST(Scores, ProdIsUnbiasedWithTheVarianceOfItsResidual) {
  const int dim = 128;
  const double left[] = {1.0, .3609, .1160, .03397};
  for (int bits = 1; bits <= 4; ++bits) {
    const Regression prod = regression(dim, 160, [&](int block) {
      return turboquant(dim, bits, ScalarScale::raw, Side::keys, true, 300 + block);
    });
    EXPECT_NEAR(prod.slope, 1.0, .01) << bits;
    const double expected = 1.5707963 * left[bits - 1];
    EXPECT_NEAR(prod.variance, expected, .05 * expected) << bits;
  }
}

TEST(Sketch, EntriesHaveMeanZeroAndVarianceOne) {
  auto sketch = turboquant::gaussian_sketch(256, 5);
  double mean = 0, square = 0, fourth = 0;
  for (float v : sketch->rows) {
    mean += v;
    square += double(v) * v;
    fourth += std::pow(double(v), 4);
  }
  const double n = static_cast<double>(sketch->rows.size());
  EXPECT_NEAR(mean / n, 0.0, .02);
  EXPECT_NEAR(square / n, 1.0, .02);
  EXPECT_NEAR(fourth / n, 3.0 - .075, .1);
  EXPECT_EQ(turboquant::gaussian_sketch(256, 5), sketch);
  EXPECT_NE(turboquant::gaussian_sketch(256, 6)->rows, sketch->rows);
  EXPECT_EQ(sketch->rows[3 * 256 + 7], sketch->columns[7 * 256 + 3]);
}

// T1: the rotated query scores the rotated key.
TEST(Scores, QueryAndKeyMoveTogether) {
  Random random(41);
  for (int dim : {48, 64, 80, 128}) {
    auto codec = turboquant(dim, 4);
    for (int trial = 0; trial < 50; ++trial) {
      std::vector<float> q = random.normal(dim), k = random.normal(dim);
      double exact = 0, moved = 0, size = 0;
      for (int d = 0; d < dim; ++d) {
        exact += double(q[d]) * k[d];
        size += std::abs(double(q[d]) * k[d]);
      }
      codec->transform_query(0, q.data(), 1);
      codec->forward(0, k.data(), 1);
      for (int d = 0; d < dim; ++d) moved += double(q[d]) * k[d];
      EXPECT_NEAR(moved, exact, 1e-5 * size);
    }
  }
}

// ALGORITHMS 7, recomputed for the head_dim.
TEST(Format, BytesOfATokenAreTheFormulas) {
  for (int dim : {8, 48, 64, 80, 128, 256}) {
    for (int bits = 1; bits <= 4; ++bits) {
      for (Side side : {Side::keys, Side::values}) {
        EXPECT_EQ(turboquant(dim, bits, {}, side)->token_bytes(), dim * bits / 8 + 2);
        EXPECT_EQ(turboquant(dim, bits, {}, side)->block_bytes(), 64 * (dim * bits / 8 + 2));
        EXPECT_EQ(turboquant(dim, bits, {}, side, true)->token_bytes(), dim * bits / 8 + 4);
        EXPECT_EQ(rvq(dim, bits, side)->token_bytes(), dim * bits / 4 + 2);
      }
    }
  }
  EXPECT_DOUBLE_EQ(rvq(128, 1)->bits_per_element(), 2.125);
  EXPECT_DOUBLE_EQ(turboquant(128, 4)->bits_per_element(), 4.125);
}

// T10: interchange is the code stream that the head of codec.h promises; and it comes back.
TEST(Format, InterchangeRoundTripsAndIsADenseStream) {
  Random random(51);
  for (int dim : {8, 48, 80, 128}) {
    for (Side side : {Side::keys, Side::values}) {
      for (const CodecPtr& codec : all_codecs(dim, side)) {
        const int n = 41;
        std::vector<float> x = random.normal(n * dim);
        std::vector<uint8_t> block(codec->block_bytes()), again(block.size(), 0x77);
        codec->encode_block(Backend::cpu, {}, x.data(), n, block.data());
        std::vector<uint8_t> rows(n * codec->token_bytes());
        codec->unpack_tokens(block.data(), n, rows.data());
        codec->pack_tokens(rows.data(), n, again.data());
        EXPECT_EQ(block, again) << codec->name();
      }
    }
  }
  auto codec = turboquant(64, 3);
  std::vector<float> x = random.normal(64 * 64), u = x;
  std::vector<uint8_t> block(codec->block_bytes()), rows(64 * codec->token_bytes());
  codec->encode_block(Backend::cpu, {}, x.data(), 64, block.data());
  codec->unpack_tokens(block.data(), 64, rows.data());
  codec->forward(0, u.data(), 64);
  const ScalarQuantizer quantizer = scalar_quantizer(lloyd_max_levels(64, 3), 3);
  int different = 0;
  for (int t = 0; t < 64; ++t) {
    double norm = 0;
    for (int d = 0; d < 64; ++d) norm += double(u[t * 64 + d]) * u[t * 64 + d];
    uint16_t codes[64];
    unpack_bits(&rows[t * codec->token_bytes()], 64, 3, codes);
    for (int d = 0; d < 64; ++d) {
      const float unit = static_cast<float>(u[t * 64 + d] * 8 / std::sqrt(norm));
      different += codes[d] != scalar_code(quantizer, unit);
    }
  }
  EXPECT_LE(different, 2);  // units computed in another order may fall across a boundary
}

TEST(Format, DecodingAnyBytesStaysInBounds) {
  Random random(52);
  for (Side side : {Side::keys, Side::values}) {
    for (const CodecPtr& codec : all_codecs(80, side)) {
      std::vector<uint8_t> block(codec->block_bytes());
      for (uint8_t& byte : block) byte = static_cast<uint8_t>(random.next());
      std::vector<float> y(64 * 80);
      for (Backend backend : {Backend::reference, Backend::cpu}) {
        codec->decode_block(backend, {}, block.data(), 64, y.data(), 80);
        codec->decode_block_transposed(backend, {}, block.data(), 64, y.data());
      }
    }
  }
}

TEST(Codec, RefusesWhatDoesNotFit) {
  auto refused = [](const std::function<void()>& make, const std::string& part) {
    try {
      make();
      FAIL() << "no error; wanted " << part;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  };
  refused([] { turboquant(64, 0); }, "bits: got 0, wanted 1 to 4");
  refused([] { turboquant(64, 5); }, "bits: got 5, wanted 1 to 4");
  refused([] { turboquant(63, 2); }, "head_dim: got 63");
  refused([] { turboquant(1032, 2); }, "head_dim: got 1032");
  refused([] { turboquant(64, 5, {}, Side::keys, true); }, "bits: got 5");
  refused([] { rvq(64, 0); }, "[turboquant_rvq] bits: got 0");
  refused([] { make_turboquant_codec(Side::keys, 0, 64, {}); }, "n_kv_heads: got 0");
  TurboQuantOptions both;
  both.prod = true;
  refused([&] { make_turboquant_codec(Side::keys, 1, 64, both); }, "scale");
}

TEST(Codec, ComesFromASpec) {
  CodecSpec spec{"turboquant", Side::keys, 2, 64, {{"bits", int64_t{3}}, {"seed", int64_t{9}}}};
  EXPECT_EQ(make_codec(spec, {})->name(), "turboquant 3 bits");
  spec.options["scale"] = std::string("unbiased");
  EXPECT_EQ(make_codec(spec, {})->name(), "turboquant 3 bits unbiased");
  spec.options.erase("scale");
  spec.options["prod"] = int64_t{1};
  EXPECT_EQ(make_codec(spec, {})->name(), "turboquant 2+1 bits prod");
  spec.options["sneed"] = int64_t{1};
  EXPECT_THROW(make_codec(spec, {}), Error);
  CodecSpec two{"turboquant_rvq", Side::values, 2, 64, {{"bits", int64_t{1}}}};
  EXPECT_EQ(make_codec(two, {})->name(), "turboquant_rvq 1+1 bits");
  two.options["bits"] = int64_t{5};
  EXPECT_THROW(make_codec(two, {}), Error);
}

}  // namespace
}  // namespace veloxquant
