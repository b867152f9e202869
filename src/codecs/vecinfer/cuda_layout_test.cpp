// The parts of CUDA support that run on the host: fragment order, tables, and clear errors.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <set>

#include "src/codecs/vecinfer/cuda_layout.h"
#include "src/math/float16.h"
#include "veloxquant/cuda.h"

namespace veloxquant::cuda {
namespace {

using vecinfer::kStepTokens;

// Every byte of a step has one code, and the offsets are the inverse of the fragments.
TEST(CudaLayout, FragmentsAndOffsetsAreInverse) {
  for (int chunks : {1, 2, 3, 4, 5, 6, 8, 16}) {
    for (bool keys : {true, false}) {
      std::set<int> seen;
      for (int lane = 0; lane < 32; ++lane) {
        for (int w = 0; w < 2 * chunks; ++w) {
          for (int byte = 0; byte < 4; ++byte) {
            int token = -1, m = -1;
            (keys ? vecinfer::key_fragment : vecinfer::value_fragment)(chunks, lane, w, byte,
                                                                       &token, &m);
            ASSERT_GE(token, 0);
            ASSERT_LT(token, kStepTokens);
            ASSERT_LT(m, 8 * chunks);
            const int at = vecinfer::fragment_word_offset(chunks, lane, w) + byte;
            EXPECT_EQ(at, keys ? vecinfer::key_offset(chunks, token, m)
                               : vecinfer::value_offset(chunks, token, m));
            seen.insert(at);
          }
        }
      }
      EXPECT_EQ(static_cast<int>(seen.size()), vecinfer::fragment_step_bytes(chunks));
      EXPECT_EQ(*seen.rbegin(), vecinfer::fragment_step_bytes(chunks) - 1);
    }
  }
}

std::vector<uint16_t> random_tables(size_t n, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> tables(n);
  for (uint16_t& x : tables) x = f32_to_f16(0.7f * normal(rng));
  return tables;
}

TEST(CudaTables, RoundingGivesInt8TimesAPowerOfTwoAndCostsLittle) {
  std::vector<uint16_t> tables = random_tables(3 * 256 * 4, 1);
  const std::vector<uint16_t> before = tables;
  const MutableTensorView view(tables.data(), DType::float16, {3, 256, 4});
  const double change = round_tables_to_int8(view);
  // Steps of at least the largest entry (about 4 standard deviations) / 127.5 give relative errors
  // of step^2 / 12 / variance, at most four times that for a power of two.
  EXPECT_GT(change, 0.0);
  EXPECT_LT(change, 4 * std::pow(4.5 / 127.0, 2) / 12);
  double measured = 0, energy = 0;
  for (size_t i = 0; i < tables.size(); ++i) {
    const double x = f16_to_f32(before[i]), y = f16_to_f32(tables[i]);
    measured += (y - x) * (y - x);
    energy += x * x;
  }
  EXPECT_NEAR(change, measured / energy, 1e-9);
  EXPECT_EQ(round_tables_to_int8(view), 0.0);  // rounded tables are the format
}

TEST(CudaTables, PreparedEntriesAreTheTables) {
  constexpr int kHeads = 2, kDim = 64, kSub = 16;
  std::vector<uint16_t> tables = random_tables(kHeads * kSub * 256 * 4, 2);
  round_tables_to_int8(MutableTensorView(tables.data(), DType::float16, {kHeads * kSub, 256, 4}));
  const TensorView view(tables.data(), DType::float16, {kHeads, kSub, 256, 4});
  const PreparedSide prepared = prepare_side(Side::keys, kHeads, kDim, kSub, view, Transform{});
  EXPECT_EQ(prepared.format.lookup, Lookup::by_subvector);
  EXPECT_EQ(prepared.format.block_bytes(), 64 * kSub);
  const float* scales =
      reinterpret_cast<const float*>(prepared.blob.data() + prepared.format.scales);
  for (int head = 0; head < kHeads; ++head) {
    for (int m = 0; m < kSub; ++m) {
      for (int e = 0; e < 256 * 4; ++e) {
        const int8_t k = static_cast<int8_t>(
            prepared.blob[head * prepared.format.entries_stride + m * 1024 + e]);
        EXPECT_EQ(k * scales[head * kSub + m], f16_to_f32(tables[(head * kSub + m) * 1024 + e]));
      }
    }
  }
}

TEST(CudaTables, TablesThatRepeatByLaneAreFound) {
  constexpr int kDim = 64, kSub = 16;
  std::vector<uint16_t> tables = random_tables(kSub * 256 * 4, 3);
  for (int m = 8; m < kSub; ++m) {
    std::copy_n(tables.begin() + (m % 8) * 1024, 1024, tables.begin() + m * 1024);
  }
  round_tables_to_int8(MutableTensorView(tables.data(), DType::float16, {kSub, 256, 4}));
  const TensorView view(tables.data(), DType::float16, {1, kSub, 256, 4});
  EXPECT_EQ(prepare_side(Side::values, 1, kDim, kSub, view, {}).format.lookup, Lookup::by_lane);
  EXPECT_EQ(prepare_side(Side::keys, 1, kDim, kSub, view, {}).format.lookup, Lookup::by_subvector);
  const TensorView one(tables.data(), DType::float16, {1, 1, 256, 4});
  EXPECT_EQ(prepare_side(Side::keys, 1, kDim, kSub, one, {}).format.lookup, Lookup::by_lane);
}

TEST(CudaTables, RefusesWhatTheKernelsCannotTake) {
  std::vector<uint16_t> tables = random_tables(256 * 8, 4);
  const auto prepare = [&](int head_dim, int n_subvectors, int centroids) {
    const int sub_dim = head_dim / n_subvectors;
    prepare_side(Side::keys, 1, head_dim, n_subvectors,
                 TensorView(tables.data(), DType::float16, {1, 1, centroids, sub_dim}),
                 Transform{});
  };
  EXPECT_THROW(prepare(64, 16, 256), Error);  // not int8 times a power of two
  EXPECT_THROW(prepare(64, 8, 256), Error);   // sub-vectors of 8 dimensions
  EXPECT_THROW(prepare(72, 36, 256), Error);  // head_dim
  EXPECT_THROW(prepare(64, 32, 16), Error);   // 4-bit codes
  EXPECT_NO_THROW(prepare(64, 32, 256));
}

// Without a GPU, or without CUDA in the library, a call says so and nothing else happens.
TEST(CudaErrors, AreClearWithoutAGpu) {
  try {
    device_name();
    GTEST_SKIP() << "there is a GPU here: tools/gpu checks the kernels";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("wanted"), std::string::npos) << error.what();
  }
  EXPECT_THROW(decode_attention(DecodeArgs{}, nullptr), Error);
  EXPECT_THROW(decode_workspace_bytes(DecodeArgs{}), Error);
}

}  // namespace
}  // namespace veloxquant::cuda
