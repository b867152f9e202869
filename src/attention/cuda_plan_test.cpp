// The host's side of the plan: what can be held without a device.
#include "src/attention/cuda_plan.h"

#include <gtest/gtest.h>

namespace veloxquant::attention::cuda {
namespace {

TEST(CudaPlan, ExactTokensAreUnitsAfterThePackedBlocks) {
  EXPECT_EQ(units_of(0, 0).all, 0);
  EXPECT_EQ(units_of(64, 0).blocks, 1);
  EXPECT_EQ(units_of(65, 16).blocks, 2);
  EXPECT_EQ(units_of(65, 16).all, 3);
  EXPECT_EQ(units_of(3996, 100).blocks, 63);
  EXPECT_EQ(units_of(3996, 100).all, 70);  // 7 chunks of 16
}

TEST(CudaPlan, PartsCoverAllUnitsAndDifferByOneAtMost) {
  for (int all = 1; all < 2500; all += 1 + all / 40) {
    for (int n_parts : {1, 2, 3, 11, 16, 132}) {
      if (n_parts > all) continue;
      const Units units = {all, all};
      const float per_part = static_cast<float>(all) / static_cast<float>(n_parts);
      EXPECT_EQ(first_unit(units, 0, n_parts, per_part), 0);
      EXPECT_EQ(first_unit(units, n_parts, n_parts, per_part), all);
      for (int part = 0; part < n_parts; ++part) {
        const int n = first_unit(units, part + 1, n_parts, per_part) -
                      first_unit(units, part, n_parts, per_part);
        EXPECT_GE(n, all / n_parts) << all << " in " << n_parts;
        EXPECT_LE(n, all / n_parts + 1) << all << " in " << n_parts;
      }
    }
  }
}

TEST(CudaPlan, TheFirstPartWithExactTokensIsFound) {
  for (int blocks = 0; blocks < 300; blocks += 1 + blocks / 20) {
    for (int chunks = 1; chunks < 80; chunks += 1 + chunks / 8) {
      for (int n_parts : {1, 2, 5, 12, 16}) {
        const Units units = {blocks, blocks + chunks};
        const float per_part = static_cast<float>(units.all) / static_cast<float>(n_parts);
        int expected = 0;
        while (first_unit(units, expected + 1, n_parts, per_part) <= blocks) ++expected;
        EXPECT_EQ(first_exact_part(units, n_parts, per_part), expected)
            << blocks << " and " << chunks << " in " << n_parts;
      }
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
