// The host's side of the plan: what can be held without a device.
#include "src/attention/cuda_plan.h"

#include <gtest/gtest.h>

namespace veloxquant::attention::cuda {
namespace {

TEST(CudaPlan, ExactTokensGoToAsManyPartsAsTheyFillWithFourChunks) {
  EXPECT_EQ(exact_parts(0, 16), 0);
  EXPECT_EQ(exact_parts(1, 16), 1);
  EXPECT_EQ(exact_parts(64, 16), 1);  // four chunks of 16
  EXPECT_EQ(exact_parts(65, 16), 2);
  EXPECT_EQ(exact_parts(100, 16), 2);
  EXPECT_EQ(exact_parts(100, 1), 1);
  EXPECT_EQ(exact_parts(100000, 16), 16);
  // Every part that has a share has a chunk: there are at least as many chunks as parts.
  for (int n_exact = 1; n_exact < 3000; ++n_exact) {
    for (int n_parts : {1, 2, 3, 16, 132}) {
      const int parts = exact_parts(n_exact, n_parts);
      EXPECT_GE(divide_up(n_exact, kChunkTokens), parts) << n_exact << " of " << n_parts;
      EXPECT_GE(parts, 1);
      EXPECT_LE(parts, n_parts);
    }
  }
}

TEST(CudaPlan, RecordsAreWhole16BytesAndHoldBothSides) {
  EXPECT_EQ(record_floats(4, 128), 2 * 4 * 128 + 16);
  EXPECT_EQ(record_floats(8, 80), 2 * 8 * 80 + 32);
  for (int heads : {4, 8}) {
    for (int dim : {64, 80, 96, 128, 256}) EXPECT_EQ(record_floats(heads, dim) % 4, 0);
  }
}

TEST(CudaPlan, CountersHaveRoomForAllItemsOfAPair) {
  EXPECT_EQ(kCounterMark & kCounterBits, 0u);
  EXPECT_NE(kCounterMark, 0u);
  EXPECT_EQ(max_items(132), 528);
  EXPECT_LT(max_items(1024), static_cast<int>(kCounterBits));
}

}  // namespace
}  // namespace veloxquant::attention::cuda
