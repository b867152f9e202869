// T11 of ALGORITHMS section 9: attention does not depend on into how many parts the tokens are
// split, merged by their log-sum-exp, nor on how many stay exact where the codec loses nothing.
#include <gtest/gtest.h>

#include <cmath>

#include "src/codecs/lookup/plane_codes.h"
#include "src/math/float16.h"
#include "tests/support/random.h"
#include "veloxquant/cache.h"
#include "veloxquant/exact.h"
#include "veloxquant/turboquant.h"

namespace veloxquant {
namespace {

using test::Random;

constexpr int kKvHeads = 2, kHeads = 6, kDim = 64;
constexpr int64_t kTokens = 20 * kBlockTokens;
constexpr double kTolerance = 1e-4;

struct Result {
  std::vector<float> out, lse;
  Result() : out(kHeads * kDim, NAN), lse(kHeads, NAN) {}
};

class Splits : public ::testing::Test {
 protected:
  Splits() {
    Random random(11);
    // Of 16 bits, so that the exact codec keeps them as they are.
    for (std::vector<float>* side : {&keys_, &values_}) {
      *side = random.normal(kKvHeads * kTokens * kDim);
      for (float& v : *side) v = f16_to_f32(f32_to_f16(v));
    }
    query_ = random.normal(kHeads * kDim);
  }

  ~Splits() override { lookup::set_plane_use(lookup::PlaneUse::fast); }

  // Attention over tokens [first, first + n) in a cache of their own.
  Result attend(bool exact, int window, int sinks, int64_t first, int64_t n) const {
    KvCacheConfig config;
    config.n_kv_heads = kKvHeads;
    config.head_dim = kDim;
    config.window = window;
    config.sinks = sinks;
    auto codec = [&](Side side) {
      if (exact) return make_exact_codec(side, kKvHeads, kDim, DType::float16);
      TurboQuantOptions options;
      options.bits = 2;
      return make_turboquant_codec(side, kKvHeads, kDim, options);
    };
    config.key_codec = codec(Side::keys);
    config.value_codec = codec(Side::values);
    KvCache cache(config);
    cache.append(part(keys_, first, n), part(values_, first, n));
    AttentionParams params;
    params.scale = 0.3f;  // some tokens count for more than others
    Result result;
    cache.attend(TensorView(query_.data(), DType::float32, {1, kHeads, 1, kDim}), params,
                 MutableTensorView(result.out.data(), DType::float32, {1, kHeads, 1, kDim}),
                 MutableTensorView(result.lse.data(), DType::float32, {1, kHeads, 1}));
    return result;
  }

  // Parts between ascending cuts, merged in fp64.
  Result merged(bool exact, int window, const std::vector<int64_t>& cuts) const {
    std::vector<double> out(kHeads * kDim, 0.0), weight(kHeads, 0.0);
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      const Result one = attend(exact, window, 0, cuts[i], cuts[i + 1] - cuts[i]);
      for (int h = 0; h < kHeads; ++h) {
        const double share = std::exp(static_cast<double>(one.lse[h]));
        weight[h] += share;
        for (int d = 0; d < kDim; ++d) out[h * kDim + d] += share * one.out[h * kDim + d];
      }
    }
    Result result;
    for (int h = 0; h < kHeads; ++h) {
      result.lse[h] = static_cast<float>(std::log(weight[h]));
      for (int d = 0; d < kDim; ++d) {
        result.out[h * kDim + d] = static_cast<float>(out[h * kDim + d] / weight[h]);
      }
    }
    return result;
  }

  static void expect_same(const Result& got, const Result& wanted, double tolerance = kTolerance) {
    double error = 0.0, size = 0.0;
    for (int i = 0; i < kHeads * kDim; ++i) {
      error += std::pow(static_cast<double>(got.out[i]) - wanted.out[i], 2);
      size += std::pow(static_cast<double>(wanted.out[i]), 2);
    }
    EXPECT_LE(std::sqrt(error), tolerance * std::sqrt(size));
    for (int h = 0; h < kHeads; ++h) EXPECT_NEAR(got.lse[h], wanted.lse[h], tolerance);
  }

 private:
  TensorView part(const std::vector<float>& side, int64_t first, int64_t n) const {
    TensorView view(side.data() + first * kDim, DType::float32, {1, kKvHeads, n, kDim});
    view.stride[1] = kTokens * kDim;
    return view;
  }

  std::vector<float> keys_, values_, query_;
};

std::vector<int64_t> even_cuts(int n) {
  std::vector<int64_t> cuts;
  for (int i = 0; i <= n; ++i) cuts.push_back(kTokens / kBlockTokens * i / n * kBlockTokens);
  return cuts;
}

// Look-ups in registers round their tables and weights: by parts otherwise than as a whole.
TEST_F(Splits, MergeToTheWholeWithinTheRoundingOfLookUpsInRegisters) {
  const Result whole = attend(false, 0, 0, 0, kTokens);
  for (int n : {1, 3, 20}) {
    SCOPED_TRACE(n);
    expect_same(merged(false, 0, even_cuts(n)), whole, 2e-3);
  }
}

TEST_F(Splits, MergeToTheWholeWhateverTheirNumber) {
  lookup::set_plane_use(lookup::PlaneUse::never);
  for (bool exact : {true, false}) {
    SCOPED_TRACE(exact ? "exact" : "turboquant");
    const Result whole = attend(exact, 0, 0, 0, kTokens);
    for (int n : {1, 2, 3, 7, 20}) {
      SCOPED_TRACE(n);
      expect_same(merged(exact, 0, even_cuts(n)), whole);
    }
  }
}

TEST_F(Splits, MergeToTheWholeWhereverTheyLie) {
  const Result whole = attend(true, 64, 4, 0, kTokens);
  Random random(12);
  for (int round = 0; round < 8; ++round) {
    std::vector<int64_t> cuts{0};
    while (cuts.back() < kTokens) {
      const int64_t step = 1 + static_cast<int64_t>(random.next() % 300);
      cuts.push_back(std::min(kTokens, cuts.back() + step));
    }
    expect_same(merged(true, round * 30, cuts), whole);
  }
}

TEST_F(Splits, AreIndependentOfWhatStaysExact) {
  const Result whole = attend(true, 0, 0, 0, kTokens);
  for (int window : {1, 63, 64, 200, 1000, 5000}) {
    for (int sinks : {0, 4, 70}) {
      SCOPED_TRACE(std::to_string(window) + " recent, " + std::to_string(sinks) + " first");
      expect_same(attend(true, window, sinks, 0, kTokens), whole);
    }
  }
}

TEST_F(Splits, AreTheSameOnEveryNumberOfThreads) {
  const Result one_thread = [&] {
    set_num_threads(1);
    return attend(false, 64, 4, 0, kTokens);
  }();
  for (int threads : {2, 3, 8}) {
    set_num_threads(threads);
    expect_same(attend(false, 64, 4, 0, kTokens), one_thread);
  }
  set_num_threads(0);
}

}  // namespace
}  // namespace veloxquant
