// Which implementation runs: the plain reference, or the CPU kernels at one of their SIMD levels.
//
// The CPU kernels are compiled once per SIMD level and picked at run time. The choice can be
// narrowed by the environment (read once, at first use) or by code:
//   VELOXQUANT_BACKEND=cpu|reference      VELOXQUANT_SIMD=<one of simd_levels()>
//   VELOXQUANT_THREADS=<n>                VELOXQUANT_LOOKUPS=registers|memory
// A value that is none of these is an Error at first use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace veloxquant {

enum class Backend { reference, cpu };

// The backend that public functions use by default.
Backend default_backend();
void set_default_backend(Backend backend);
const char* backend_name(Backend backend);

// SIMD levels this machine can run, best first (e.g. {"AVX3_DL", "AVX3", "AVX2", "SSE4"}).
std::vector<std::string> simd_levels();

// The level that runs now.
std::string simd_level();

// Restrict the CPU kernels to one level of simd_levels(); "" lifts the restriction.
// Throws Error for a level that this machine has not.
void set_simd_level(const std::string& level);

// Worker threads of the CPU kernels (default: every core). n = 0 lifts the limit.
int num_threads();
void set_num_threads(int n);

// Runs body(i) for i in [0, n), spread over the worker threads; rethrows the first error.
// `body` must not depend on the order: results are deterministic because each i owns its output.
namespace detail {
void parallel_for_impl(long n, void (*call)(const void* context, long i), const void* context);
}
template <class Body>
void parallel_for(long n, const Body& body) {
  detail::parallel_for_impl(
      n, [](const void* context, long i) { (*static_cast<const Body*>(context))(i); }, &body);
}

// Runs body(begin, end) for ranges of at most `step` that make up [0, n), in the same way.
template <class Body>
void parallel_ranges(int64_t n, int64_t step, const Body& body) {
  parallel_for(static_cast<long>((n + step - 1) / step), [&](long i) {
    const int64_t begin = i * step;
    body(begin, begin + step < n ? begin + step : n);
  });
}

// True when VELOXQUANT_DEBUG=1 or MLX_METAL_DEBUG=1: log_once prints to stderr then.
bool debug_enabled();
// One line per distinct text and process: which kernel ran and why a faster one did not.
void log_once(const std::string& text);

}  // namespace veloxquant
