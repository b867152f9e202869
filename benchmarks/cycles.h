// Clock cycles of one thread's work, measured against a loop of dependent additions in the same
// run, so that the machine's clock need not be known.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include <time.h>

namespace veloxquant::bench {

// Of this thread's own work: other programs on the machine count less than with a wall clock.
inline double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

#if defined(__aarch64__)
#define VELOXQUANT_ADD "add %0, %0, %0\n"
#else
#define VELOXQUANT_ADD "add %0, %0\n"
#endif

// Integer additions that wait for each other: one a cycle.
inline double cycle_seconds() {
  constexpr int64_t kSteps = 4000000;
  uint64_t x = 1;
  const double start = thread_seconds();
  for (int64_t i = 0; i < kSteps; i += 8) {
    asm volatile(VELOXQUANT_ADD VELOXQUANT_ADD VELOXQUANT_ADD VELOXQUANT_ADD VELOXQUANT_ADD
                     VELOXQUANT_ADD VELOXQUANT_ADD VELOXQUANT_ADD
                 : "+r"(x));
  }
  return (thread_seconds() - start) / kSteps;
}

#undef VELOXQUANT_ADD

struct Spread {
  double best, median;
};

// Of one run, over 9 rounds of `repeats` runs each; in seconds, or in cycles of the same round.
inline Spread time_of(const std::function<void()>& run, int repeats, bool in_cycles) {
  std::vector<double> results;
  for (int round = 0; round < 9; ++round) {
    const double cycle = in_cycles ? cycle_seconds() : 1.0, start = thread_seconds();
    for (int i = 0; i < repeats; ++i) run();
    results.push_back((thread_seconds() - start) / repeats / cycle);
  }
  std::sort(results.begin(), results.end());
  return {results.front(), results[results.size() / 2]};
}

}  // namespace veloxquant::bench
