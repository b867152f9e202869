// Random calls of every core function, good and bad ones, as the fuzz tests make them.
//
//   VELOXQUANT_FUZZ=100000       calls per function (default 200)
//   VELOXQUANT_FUZZ_SEED=<n>     the first seed; a failure prints the seed of its call, and with
//                                VELOXQUANT_FUZZ=1 that call alone runs again
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "tests/support/exact_random.h"
#include "veloxquant/backend.h"
#include "veloxquant/error.h"

namespace veloxquant::test {

int64_t from_environment(const char* name, int64_t fallback) {
  const char* text = std::getenv(name);
  return text == nullptr || *text == '\0' ? fallback : std::atoll(text);
}

// body(random) for every seed. An Error is an answer; anything else that throws is a failure.
template <class Body>
void fuzz(const char* name, const Body& body) {
  const int64_t calls = from_environment("VELOXQUANT_FUZZ", 200);
  const int64_t first = from_environment("VELOXQUANT_FUZZ_SEED", 1);
  const std::vector<std::string> levels = simd_levels();
  int64_t n_errors = 0;
  for (int64_t seed = first; seed < first + calls; ++seed) {
    ExactRandom random(static_cast<uint64_t>(seed));
    set_simd_level(levels[random.below(static_cast<int>(levels.size()))]);
    SCOPED_TRACE(std::string(name) +
                 ": VELOXQUANT_FUZZ=1 VELOXQUANT_FUZZ_SEED=" + std::to_string(seed));
    try {
      body(random);
    } catch (const Error&) {
      ++n_errors;
    }
    if (::testing::Test::HasFailure()) break;
  }
  set_simd_level("");
  std::printf("%s: %lld calls from seed %lld, %lld refused\n", name, static_cast<long long>(calls),
              static_cast<long long>(first), static_cast<long long>(n_errors));
  EXPECT_TRUE(calls < 100 || n_errors < calls / 2) << "most calls should be good ones";
}

// Bit patterns that trouble arithmetic, one in eight.
inline float any_float(ExactRandom& random) {
  const float odd[] = {0.0f, -0.0f, 1e-45f, 1e-38f, -3e38f, 3e38f, INFINITY, -INFINITY, NAN};
  return random.below(8) == 0 ? odd[random.below(9)] : random.value();
}
inline std::vector<float> any_floats(ExactRandom& random, int64_t n) {
  std::vector<float> x(n);
  for (float& v : x) v = any_float(random);
  return x;
}
template <class T>
std::vector<T> any_bytes(ExactRandom& random, int64_t n) {
  std::vector<T> x(n);
  for (T& v : x) v = static_cast<T>(random.next());
  return x;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], sizeof(T)) != 0 && !(a[i] != a[i] && b[i] != b[i])) return false;
  }
  return a.size() == b.size();
}

inline int one_of(ExactRandom& random, std::initializer_list<int> values) {
  return values.begin()[random.below(static_cast<int>(values.size()))];
}

}  // namespace veloxquant::test
