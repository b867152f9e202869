// What the tests of k-means and of tables share.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "src/calibration/random.h"
#include "veloxquant/error.h"

namespace veloxquant {

inline std::vector<float> gaussian(int64_t n, uint64_t seed) {
  SplitMix64 random(seed, 0);
  std::vector<float> x(n);
  for (float& v : x) {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - random.uniform()));
    v = static_cast<float>(radius * std::cos(6.283185307179586 * random.uniform()));
  }
  return x;
}

template <class Call>
void expect_error(const Call& call, const char* message) {
  try {
    call();
    ADD_FAILURE() << "no error, wanted one with " << message;
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr(message));
  }
}

}  // namespace veloxquant
