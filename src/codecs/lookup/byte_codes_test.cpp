// Attention's kernels on the codes of single dimensions, on every SIMD level, against decoded
// tokens: sign codecs and scalar codecs. (VecInfer's: src/attention/codes_test.cpp.)
#include <gtest/gtest.h>
#include <hwy/aligned_allocator.h>

#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "src/codecs/lookup/plane_codes.h"
#include "src/codecs/lookup/plane_kernels.h"
#include "tests/support/random.h"
#include "veloxquant/qjl.h"
#include "veloxquant/rabitq.h"
#include "veloxquant/turboquant.h"

namespace veloxquant {
namespace {

using test::Random;

struct Named {
  std::string label;
  CodecPtr codec;
};

std::vector<Named> codecs_with_kernels(int dim, const std::vector<float>& sketch) {
  std::vector<Named> codecs;
  for (int bits = 1; bits <= 4; ++bits) {
    RabitqOptions options;
    options.bits = bits;
    codecs.push_back({"rabitq", make_rabitq_codec(Side::keys, 2, dim, options)});
  }
  for (int blocks : {1, 3}) {
    QjlOptions options;
    options.sketch_bits = blocks * dim;
    codecs.push_back({"qjl", make_qjl_codec(2, dim, options)});
  }
  QjlOptions options;
  options.sketch = TensorView(sketch.data(), DType::float32, {40, dim});
  codecs.push_back({"qjl given", make_qjl_codec(2, dim, options)});
  return codecs;
}

// Keys in streams by dimension, values by token.
std::vector<Named> scalar_codecs(int dim) {
  std::vector<Named> codecs;
  for (Side side : {Side::keys, Side::values}) {
    const std::string label = side == Side::keys ? "keys" : "values";
    for (int bits = 1; bits <= 4; ++bits) {
      TurboQuantOptions options;
      options.bits = bits;
      options.seed = 5;
      codecs.push_back({label, make_turboquant_codec(side, 2, dim, options)});
      options.prod = true;
      options.scale = ScalarScale::raw;
      codecs.push_back({label, make_turboquant_codec(side, 2, dim, options)});
      RvqOptions two_stages;
      two_stages.bits = bits;
      codecs.push_back({label, make_rvq_codec(side, 2, dim, two_stages)});
    }
  }
  return codecs;
}

// The SIMD level, and whether look-ups are made in registers, by 16-bit integers.
class CodeKernels : public ::testing::TestWithParam<std::tuple<std::string, lookup::PlaneUse>> {
 protected:
  void SetUp() override {
    set_simd_level(std::get<0>(GetParam()));
    lookup::set_plane_use(std::get<1>(GetParam()));
  }
  void TearDown() override {
    set_simd_level("");
    lookup::set_plane_use(lookup::PlaneUse::fast);
  }
};

TEST_P(CodeKernels, ScoresAndSumsAreThoseOfDecodedTokens) {
  Random random(51);
  const int n_blocks = 19, n_tokens = 64 * n_blocks;  // more than one chunk of 16
  const bool in_fp32 = std::get<1>(GetParam()) == lookup::PlaneUse::never;
  const double tolerance = in_fp32 ? 4e-6 : 1e-3;
  for (int dim : {8, 48, 64, 80, 128}) {
    const std::vector<float> sketch = random.normal(40 * dim);
    std::vector<Named> codecs = codecs_with_kernels(dim, sketch);
    for (Named& scalar : scalar_codecs(dim)) codecs.push_back(std::move(scalar));
    for (const Named& named : codecs) {
      SCOPED_TRACE(named.label + " " + named.codec->name() + " dim " + std::to_string(dim));
      const Codec& codec = *named.codec;
      if (codec.code_kernel(Backend::cpu).empty()) continue;  // no vectors of four floats
      const std::vector<float> x = random.normal(int64_t{n_tokens} * dim);
      std::vector<uint8_t> blocks(codec.block_bytes() * n_blocks);
      std::vector<float> y(x.size());
      for (int b = 0; b < n_blocks; ++b) {
        uint8_t* block = &blocks[b * codec.block_bytes()];
        codec.encode_block(Backend::cpu, {}, &x[b * 64 * dim], 64, block);
        codec.decode_block(Backend::cpu, {}, block, 64, &y[b * 64 * dim], dim);
      }
      for (int n_rows : {1, 3, 9}) {
        std::vector<float> q = random.normal(n_rows * dim), scores(n_rows * n_tokens, NAN);
        // As attention's scores are: queries much larger are not looked up in registers.
        for (float& x : q) x /= std::sqrt(static_cast<float>(dim));
        codec.transform_query(0, q.data(), n_rows);
        codec.code_scores({}, q.data(), n_rows)
            ->score(blocks.data(), n_blocks, scores.data(), n_tokens);
        double squares = 0;
        for (int r = 0; r < n_rows; ++r) {
          for (int t = 0; t < n_tokens; ++t) {
            double want = 0, size = 0;
            for (int d = 0; d < dim; ++d) {
              want += double(q[r * dim + d]) * y[t * dim + d];
              size += std::abs(double(q[r * dim + d]) * y[t * dim + d]);
            }
            const double error = scores[r * n_tokens + t] - want;
            squares += error * error;
            // Entries in registers are rounded, so that a small score is off as much as a large
            // one.
            ASSERT_LT(std::abs(error), in_fp32 ? tolerance * size : 6 * lookup::kMostScoreError)
                << r << " " << t;
          }
        }
        if (!in_fp32) {
          EXPECT_LT(std::sqrt(squares / (n_rows * n_tokens)), lookup::kMostScoreError);
        }
        const std::unique_ptr<CodeSums> sums = codec.code_sums({}, n_rows);
        if (sums == nullptr) continue;  // keys only
        std::vector<float> weights(n_rows * n_tokens), out(n_rows * dim, NAN);
        for (float& w : weights) w = static_cast<float>(random.uniform());
        sums->add(blocks.data(), n_blocks, weights.data(), n_tokens);
        sums->take(out.data(), dim);
        for (int r = 0; r < n_rows; ++r) {
          for (int d = 0; d < dim; ++d) {
            double want = 0, size = 0;
            for (int t = 0; t < n_tokens; ++t) {
              want += double(weights[r * n_tokens + t]) * y[t * dim + d];
              size += std::abs(weights[r * n_tokens + t] * y[t * dim + d]);
            }
            ASSERT_NEAR(out[r * dim + d], want, tolerance * size);
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Simd, CodeKernels,
                         ::testing::Combine(::testing::ValuesIn(simd_levels()),
                                            ::testing::Values(lookup::PlaneUse::never,
                                                              lookup::PlaneUse::fast,
                                                              lookup::PlaneUse::always)));

// Which of the two runs depends on the maker of the processor.
TEST(WideTables, GiveTheSameByHalvesAndByQuarters) {
  if (!lookup::has_wide_tables()) GTEST_SKIP() << "no AVX-512 VBMI here";
  Random random(52);
  constexpr int kBlocks = 5, kCodes = 3, kRows = 3, kDims = 3, kTokens = 64 * kBlocks;
  auto bytes = [&](int64_t n, int most) {
    auto x = hwy::AllocateAligned<uint8_t>(n);
    for (int64_t i = 0; i < n; ++i) x[i] = static_cast<uint8_t>(random.next() % (most + 1));
    return x;
  };
  const auto codes = bytes(kCodes * kTokens, 255);
  const auto key_tables = bytes(kCodes * 512, 127), value_tables = bytes(kDims * 512, 63);
  lookup::Blocks blocks{codes.get(), kCodes * 64, kBlocks, kCodes, 256};
  auto weights = hwy::AllocateAligned<int16_t>(kRows * kTokens);
  for (int i = 0; i < kRows * kTokens; ++i) weights[i] = static_cast<int16_t>(random.next() % 4000);
  const float units[kRows] = {1.0f, 0.5f, 0.25f};
  std::vector<std::vector<float>> found;
  for (bool by_halves : {true, false}) {
    lookup::PlaneDigits digits;
    digits.by_halves = by_halves;
    std::vector<float> result(kTokens, NAN);
    lookup::score_planes(blocks, digits, key_tables.get(), 1000, 0.5f, nullptr, result.data());
    auto sums = hwy::AllocateAligned<float>(kDims * kRows * lookup::kPlaneFloats);
    std::fill_n(sums.get(), kDims * kRows * lookup::kPlaneFloats, 0.0f);
    lookup::add_planes(blocks, 1, digits, kDims, value_tables.get(), weights.get(), units, kRows,
                       sums.get());
    result.insert(result.end(), sums.get(), sums.get() + kDims * kRows * lookup::kPlaneFloats);
    found.push_back(result);
  }
  EXPECT_EQ(found[0], found[1]);
  for (int t = 0; t < kTokens; ++t) {
    int sum = -1000;
    for (int m = 0; m < kCodes; ++m) {
      const int code = codes[t / 64 * kCodes * 64 + m * 64 + t % 64];
      sum += key_tables[m * 512 + code] + 128 * key_tables[m * 512 + 256 + code];
    }
    ASSERT_EQ(found[0][t], 0.5f * static_cast<float>(sum)) << t;
  }
}

TEST(NoCodeKernels, WithAMeanOrOutliers) {
  const std::vector<float> mean(64, 1.0f);
  RabitqOptions options;
  options.mean = TensorView(mean.data(), DType::float32, {1, 64});
  EXPECT_EQ(make_rabitq_codec(Side::keys, 1, 64, options)->code_kernel(Backend::cpu), "");
  QjlOptions outliers;
  outliers.sketch_bits = 64;
  outliers.outliers = 2;
  EXPECT_EQ(make_qjl_codec(1, 64, outliers)->code_kernel(Backend::cpu), "");
}

}  // namespace
}  // namespace veloxquant
