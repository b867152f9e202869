// Tables and smooth factors: the codec's error, determinism, and the corners: dead channels, values
// that are not finite, too many tokens.
#include "veloxquant/calibration.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "src/calibration/calibration_fixture.h"
#include "src/calibration/lloyd.h"
#include "src/math/float16.h"
#include "veloxquant/backend.h"
#include "veloxquant/cuda.h"

namespace veloxquant {
namespace {

struct Tables {
  Tables(int64_t heads, int64_t per, int64_t c, int64_t d) : bits(heads * per * c * d) {
    view = MutableTensorView(bits.data(), DType::float16, {heads, per, c, d});
  }
  std::vector<uint16_t> bits;
  MutableTensorView view;
};

// Keys with a few loud channels, as after RoPE: [H][N][D].
std::vector<float> keys(int64_t heads, int64_t n, int64_t dims, uint64_t seed) {
  auto x = gaussian(heads * n * dims, seed);
  for (size_t i = 0; i < x.size(); ++i) {
    if (i % dims % 16 == 3) x[i] = 8.0f * x[i] + 20.0f;
  }
  return x;
}

class TrainTables : public testing::TestWithParam<int> {
 protected:
  static constexpr int kHeads = 3, kTokens = 1500, kDims = 64, kSubvectors = 16;

  std::vector<uint16_t> train(TableReport* report = nullptr) {
    std::vector<float> lambda(kHeads * kDims);
    const TensorView x(x_.data(), DType::float32, {kHeads, kTokens, kDims});
    const MutableTensorView scale(lambda.data(), DType::float32, {kHeads, kDims});
    smooth_factors(x, scale);
    Tables tables(kHeads, GetParam(), 64, kDims / kSubvectors);
    Transform transform;
    transform.kind = TransformKind::hadamard;
    transform.scale = read_only(scale);
    KMeansParams params;
    params.n_centroids = 64;
    params.max_iterations = 8;
    const TableReport got =
        train_vecinfer_tables(x, transform, kSubvectors, GetParam(), params, tables.view);
    if (report != nullptr) *report = got;
    return tables.bits;
  }

  // A table for each sub-vector, as codecs take them.
  static std::vector<uint16_t> expanded(const std::vector<uint16_t>& tables) {
    const size_t size = 64 * kDims / kSubvectors, per = GetParam();
    std::vector<uint16_t> all;
    for (size_t h = 0; h < kHeads; ++h) {
      for (size_t m = 0; m < kSubvectors; ++m) {
        const auto from = tables.begin() + (h * per + m % per) * size;
        all.insert(all.end(), from, from + size);
      }
    }
    return all;
  }

  std::vector<float> x_ = keys(kHeads, kTokens, kDims, 9);
};

TEST_P(TrainTables, SameBitsWithAnyNumberOfThreads) {
  std::vector<std::vector<uint16_t>> results;
  for (int threads : {1, 2}) {
    set_num_threads(threads);
    results.push_back(train());
  }
  set_num_threads(0);
  EXPECT_EQ(results[0], results[1]);
}

TEST_P(TrainTables, SameBitsOnEverySimdLevel) {
  set_default_backend(Backend::reference);
  const auto wanted = train();
  set_default_backend(Backend::cpu);
  for (const std::string& level : simd_levels()) {
    set_simd_level(level);
    EXPECT_EQ(train(), wanted) << level;
  }
  set_simd_level("");
}

TEST_P(TrainTables, ReportIsTheErrorOfTheCodec) {
  TableReport report;
  const std::vector<uint16_t> bits = expanded(train(&report));
  std::vector<float> lambda(kHeads * kDims);
  const MutableTensorView scale(lambda.data(), DType::float32, {kHeads, kDims});
  smooth_factors(TensorView(x_.data(), DType::float32, {kHeads, kTokens, kDims}), scale);
  Transform transform;
  transform.kind = TransformKind::hadamard;
  transform.scale = read_only(scale);
  const CodecPtr codec = make_vecinfer_codec(
      Side::keys, kHeads, kDims, kSubvectors,
      TensorView(bits.data(), DType::float16, {kHeads, kSubvectors, 64, kDims / kSubvectors}),
      transform);
  for (int h = 0; h < kHeads; ++h) {
    double error = 0, energy = 0;
    std::vector<uint8_t> block(codec->block_bytes());
    for (int t = 0; t < kTokens; ++t) {
      std::vector<float> row(x_.begin() + (h * kTokens + t) * kDims,
                             x_.begin() + (h * kTokens + t + 1) * kDims);
      std::vector<float> decoded(kDims);
      codec->encode_block(Backend::cpu, {0, h, 0}, row.data(), 1, block.data());
      codec->decode_block(Backend::cpu, {0, h, 0}, block.data(), 1, decoded.data(), kDims);
      codec->forward(h, row.data(), 1);
      for (int i = 0; i < kDims; ++i) {
        error += (row[i] - decoded[i]) * (row[i] - decoded[i]);
        energy += row[i] * row[i];
      }
    }
    EXPECT_NEAR(report.relative_error[h], error / energy, 1e-5) << "head " << h;
    EXPECT_LT(report.relative_error[h], 0.25);
  }
}

INSTANTIATE_TEST_SUITE_P(Shared, TrainTables, testing::Values(1, 4, 8, 16));

TEST(Tables, StridedHalfInputAndProgress) {
  const int64_t heads = 2, n = 300, dims = 16;
  const auto x = gaussian(heads * n * dims, 4);
  // The same numbers as [N][H][D] in bf16, read as [H, N, D].
  std::vector<uint16_t> shuffled(x.size());
  std::vector<float> rounded(x.size());
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t i = 0; i < dims; ++i) {
        const uint16_t value = f32_to_bf16(x[(h * n + t) * dims + i]);
        shuffled[(t * heads + h) * dims + i] = value;
        rounded[(h * n + t) * dims + i] = bf16_to_f32(value);
      }
    }
  }
  TensorView view(shuffled.data(), DType::bfloat16, {heads, n, dims});
  view.stride = {dims, heads * dims, 1};
  KMeansParams params;
  params.n_centroids = 16;
  Tables a(heads, 4, 16, 4), b(heads, 4, 16, 4);
  std::vector<double> fractions;
  set_num_threads(1);
  train_vecinfer_tables(view, {}, 4, 4, params, a.view);
  set_num_threads(0);
  train_vecinfer_tables(TensorView(rounded.data(), DType::float32, {heads, n, dims}), {}, 4, 4,
                        params, b.view, [&](double fraction) { fractions.push_back(fraction); });
  EXPECT_EQ(a.bits, b.bits);
  EXPECT_EQ(fractions.size(), 8u);
  EXPECT_TRUE(std::is_sorted(fractions.begin(), fractions.end()));  // whichever thread is first
  EXPECT_EQ(fractions.back(), 1.0);
}

TEST(Tables, TokensThatAreNotFiniteAreLeftOut) {
  const int64_t n = 200, dims = 8;
  auto x = gaussian(n * dims, 4);
  KMeansParams params;
  params.n_centroids = 4;
  Tables clean(1, 2, 4, 4), dirty(1, 2, 4, 4);
  std::vector<float> without(x.begin() + dims, x.end());
  x[3] = NAN;
  train_vecinfer_tables(TensorView(x.data(), DType::float32, {1, n, dims}), {}, 2, 2, params,
                        dirty.view);
  train_vecinfer_tables(TensorView(without.data(), DType::float32, {1, n - 1, dims}), {}, 2, 2,
                        params, clean.view);
  EXPECT_EQ(clean.bits, dirty.bits);
  std::fill(x.begin(), x.end(), INFINITY);
  expect_error(
      [&] {
        train_vecinfer_tables(TensorView(x.data(), DType::float32, {1, n, dims}), {}, 2, 2, params,
                              dirty.view);
      },
      "no token of head 0 is finite");
}

TEST(Tables, LargeCentroidsStayFiniteInHalf) {
  const std::vector<float> x(100 * 8, 1e6f);
  Tables tables(1, 2, 2, 4);
  KMeansParams params;
  params.n_centroids = 2;
  train_vecinfer_tables(TensorView(x.data(), DType::float32, {1, 100, 8}), {}, 2, 2, params,
                        tables.view);
  for (uint16_t half : tables.bits) EXPECT_EQ(f16_to_f32(half), 65504.0f);
  train_vecinfer_tables(TensorView(x.data(), DType::float32, {1, 100, 8}), {}, 2, 2, params,
                        tables.view, {}, TableEntries::int8);
  for (uint16_t half : tables.bits) EXPECT_EQ(f16_to_f32(half), 127 * 512.0f);
}

// The report is that of the rounded entries, and GPUs take the tables as they are.
TEST(Tables, Int8EntriesAreTheFormatAndCostLittle) {
  const int64_t n = 4096, dims = 16;
  const auto x = gaussian(n * dims, 11);
  const TensorView view(x.data(), DType::float32, {1, n, dims});
  KMeansParams params;
  params.n_centroids = 64;
  for (int n_tables : {4, 2, 1}) {
    Tables fp16(1, n_tables, 64, 4), int8(1, n_tables, 64, 4);
    const double before =
        train_vecinfer_tables(view, {}, 4, n_tables, params, fp16.view).relative_error[0];
    const double after =
        train_vecinfer_tables(view, {}, 4, n_tables, params, int8.view, {}, TableEntries::int8)
            .relative_error[0];
    EXPECT_NE(int8.bits, fp16.bits);
    EXPECT_NE(after, before);
    EXPECT_LT(std::abs(after - before), 0.01 * before);
    EXPECT_EQ(cuda::round_tables_to_int8(int8.view), 0.0);  // nothing is left to round
  }
}

// Sub-vector m trains table m % n alone, on what kmeans() would make of its sub-vectors together;
// repeated for each sub-vector the tables are looked up by lane.
TEST(Tables, ByLaneEachTableSeesItsSubvectorsAndGpusFindThem) {
  const int64_t n = 600, dims = 64;
  const int subvectors = 16;
  const auto x = gaussian(n * dims, 12);
  std::vector<float> weights(n);
  for (int64_t t = 0; t < n; ++t) weights[t] = 0.5f + static_cast<float>(t % 5);
  KMeansParams params;
  params.n_centroids = 256;
  params.max_iterations = 5;
  for (Side side : {Side::keys, Side::values}) {
    const int lanes = cuda::lane_tables(side), share = subvectors / lanes;
    Tables tables(1, lanes, 256, 4), all(1, subvectors, 256, 4);
    train_vecinfer_tables(TensorView(x.data(), DType::float32, {1, n, dims}), {}, subvectors, lanes,
                          params, tables.view, {}, TableEntries::int8,
                          TensorView(weights.data(), DType::float32, {1, n}));
    for (int m = 0; m < subvectors; ++m) {
      std::copy_n(tables.bits.begin() + m % lanes * 1024, 1024, all.bits.begin() + m * 1024);
    }
    const cuda::PreparedSide prepared =
        cuda::prepare_side(side, 1, dims, subvectors, read_only(all.view), {});
    EXPECT_EQ(prepared.format.lookup, cuda::Lookup::by_lane);
    for (int c = 0; c < lanes; ++c) {
      std::vector<float> own(4 * share * n), counts(share * n);
      for (int64_t k = 0; k < share * n; ++k) {
        const int64_t m = c + lanes * (k / n), t = k % n;
        for (int i = 0; i < 4; ++i) own[i * share * n + k] = x[t * dims + m * 4 + i];
        counts[k] = weights[t];
      }
      KMeansParams seeded = params;
      seeded.seed = SplitMix64(params.seed, c).next();
      std::vector<float> wanted =
          kmeans(own.data(), share * n, share * n, 4, seeded, counts.data()).centroids;
      std::vector<uint16_t> halves(1024);
      for (int i = 0; i < 1024; ++i) halves[i] = f32_to_f16(wanted[i]);
      cuda::round_tables_to_int8(MutableTensorView(halves.data(), DType::float16, {256, 4}));
      EXPECT_TRUE(std::equal(halves.begin(), halves.end(), tables.bits.begin() + c * 1024)) << c;
    }
  }
}

TEST(Tables, MoreTokensThanTheLimitAreSubsampled) {
  const int64_t n = 3 * kMaxTrainingVectors + 17, dims = 8;
  const auto x = gaussian(n * dims, 8);
  KMeansParams params;
  params.n_centroids = 4;
  const double wanted = kmeans(x.data(), n * 2, n * 2, 4, params).mse_per_dim;
  for (int n_tables : {2, 1}) {
    Tables tables(1, n_tables, 4, 4);
    const auto report = train_vecinfer_tables(TensorView(x.data(), DType::float32, {1, n, dims}),
                                              {}, 2, n_tables, params, tables.view);
    EXPECT_NEAR(report.relative_error[0], wanted, 0.01);
  }
}

TEST(Tables, BadArgumentsAreErrors) {
  const std::vector<float> x(2 * 10 * 16, 1.0f);
  const TensorView view(x.data(), DType::float32, {2, 10, 16});
  Tables tables(2, 4, 16, 4);
  KMeansParams params;
  params.n_centroids = 16;
  const auto run = [&](const TensorView& input, int subvectors, int n_tables,
                       const MutableTensorView& out, const Transform& transform = {}) {
    return [=] { train_vecinfer_tables(input, transform, subvectors, n_tables, params, out); };
  };
  expect_error(run({}, 4, 4, tables.view), "wanted [H, N, D]");
  expect_error(run(TensorView(x.data(), DType::int32, {2, 10, 16}), 4, 4, tables.view),
               "x: got int32");
  expect_error(run(TensorView(x.data(), DType::float32, {2, 0, 16}), 4, 4, tables.view),
               "N, D >= 1");
  expect_error(run(view, 5, 4, tables.view), "n_subvectors: got 5");
  expect_error(run(view, 0, 4, tables.view), "n_subvectors: got 0");
  expect_error(run(view, 4, 0, tables.view), "n_tables: got 0, wanted 1 to n_subvectors = 4");
  expect_error(run(view, 4, 5, tables.view), "n_tables: got 5");
  expect_error(run(view, 4, 1, tables.view), "wanted float16 [2, 1, 16, 4]");
  expect_error(run(view, 4, 4, {}), "tables: got");
  Transform no_matrix;
  no_matrix.kind = TransformKind::dense;
  expect_error(run(view, 4, 4, tables.view, no_matrix), "encode_matrix");
  params.n_centroids = 4097;
  Tables large(2, 4, 4097, 4);
  expect_error(run(view, 4, 4, large.view), "n_centroids: got 4097");
}

// --------------------------------------------------------------------------- smooth factors

std::vector<float> factors(const TensorView& x, float floor = 1e-4f) {
  std::vector<float> lambda(x.shape[0] * x.shape[2]);
  smooth_factors(x, MutableTensorView(lambda.data(), DType::float32, {x.shape[0], x.shape[2]}),
                 floor);
  return lambda;
}

TEST(SmoothFactors, AreRootsOfTheLargestMagnitudes) {
  const std::vector<float> x = {1, -4, 9, -16, 2, 3,    // head 0: 3 tokens of 2
                                0, 0,  0, 25,  0, -1};  // head 1
  EXPECT_THAT(factors(TensorView(x.data(), DType::float32, {2, 3, 2})),
              testing::ElementsAre(3, 4, std::sqrt(1e-4f * 25), 5));
}

TEST(SmoothFactors, DeadChannelsHeadsAndValuesThatAreNotFinite) {
  const std::vector<float> x = {NAN, 4, INFINITY, 1, -INFINITY, 9};
  EXPECT_THAT(factors(TensorView(x.data(), DType::float32, {1, 3, 2}), 0.25f),
              testing::ElementsAre(1.5f, 3));
  const std::vector<float> zeros(8, 0.0f);
  for (float v : factors(TensorView(zeros.data(), DType::float32, {2, 2, 2}))) {
    EXPECT_EQ(v, std::sqrt(1e-8f));
  }
}

TEST(SmoothFactors, StridesAndHalfPrecision) {
  const auto x = gaussian(3 * 40 * 8, 2);
  for (DType dtype : {DType::float16, DType::bfloat16}) {
    std::vector<uint16_t> bits(x.size());
    std::vector<float> rounded(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      bits[i] = dtype == DType::float16 ? f32_to_f16(x[i]) : f32_to_bf16(x[i]);
      rounded[i] = dtype == DType::float16 ? f16_to_f32(bits[i]) : bf16_to_f32(bits[i]);
    }
    EXPECT_EQ(factors(TensorView(bits.data(), dtype, {3, 40, 8})),
              factors(TensorView(rounded.data(), DType::float32, {3, 40, 8})));
  }
  // [D][N][H] in memory, tokens backwards; lambda transposed as well.
  std::vector<float> turned(x.size());
  for (int h = 0; h < 3; ++h) {
    for (int t = 0; t < 40; ++t) {
      for (int i = 0; i < 8; ++i) turned[(i * 40 + 39 - t) * 3 + h] = x[(h * 40 + t) * 8 + i];
    }
  }
  TensorView view(turned.data() + 39 * 3, DType::float32, {3, 40, 8});
  view.stride = {1, -3, 120};
  EXPECT_EQ(factors(view), factors(TensorView(x.data(), DType::float32, {3, 40, 8})));
  std::vector<float> transposed(24);
  MutableTensorView lambda(transposed.data(), DType::float32, {3, 8});
  lambda.stride = {1, 3};
  smooth_factors(view, lambda);
  for (int h = 0; h < 3; ++h) {
    for (int i = 0; i < 8; ++i) EXPECT_EQ(transposed[i * 3 + h], factors(view)[h * 8 + i]);
  }
}

TEST(SmoothFactors, BadArgumentsAreErrors) {
  std::vector<float> x(24, 1.0f), out(8);
  const TensorView view(x.data(), DType::float32, {2, 3, 4});
  const MutableTensorView lambda(out.data(), DType::float32, {2, 4});
  expect_error([&] { smooth_factors({}, lambda); }, "wanted [H, N, D]");
  expect_error([&] { smooth_factors(view, {}); }, "lambda: got");
  expect_error(
      [&] {
        smooth_factors(view, MutableTensorView(out.data(), DType::float32, {4, 2}));
      },
      "wanted float32 [2, 4]");
  expect_error(
      [&] {
        smooth_factors(view, MutableTensorView(out.data(), DType::float16, {2, 4}));
      },
      "lambda: got float16");
  expect_error([&] { smooth_factors(view, lambda, NAN); }, "floor");
  expect_error([&] { smooth_factors(view, lambda, 2.0f); }, "floor");
}

}  // namespace
}  // namespace veloxquant
