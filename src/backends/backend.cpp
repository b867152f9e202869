// Backend and SIMD choice, worker threads, the debug log.
#include "veloxquant/backend.h"

#include <tbb/global_control.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

#include "src/backends/cpu/simd_targets.h"
#include "veloxquant/error.h"

namespace veloxquant {
namespace {

bool environment_flag(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

Backend backend_from_environment() {
  const char* value = std::getenv("VELOXQUANT_BACKEND");
  if (value == nullptr || *value == '\0' || std::strcmp(value, "cpu") == 0) return Backend::cpu;
  if (std::strcmp(value, "reference") == 0) return Backend::reference;
  fail("[backend] VELOXQUANT_BACKEND: got '", value, "', wanted cpu or reference");
}

std::atomic<int>& chosen_backend() {
  static std::atomic<int> backend{static_cast<int>(backend_from_environment())};
  return backend;
}

int threads_from_environment() {
  const char* value = std::getenv("VELOXQUANT_THREADS");
  return value == nullptr ? 0 : std::max(0, std::atoi(value));
}

std::atomic<int>& thread_limit() {
  static std::atomic<int> limit{threads_from_environment()};
  return limit;
}

// One arena per limit that was ever asked for: an arena must outlive the loops that run in it.
tbb::task_arena& arena(int n_threads) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<tbb::task_arena>> arenas;
  std::lock_guard<std::mutex> lock(mutex);
  for (auto& known : arenas) {
    if (known->max_concurrency() == n_threads) return *known;
  }
  arenas.push_back(std::make_unique<tbb::task_arena>(n_threads));
  arenas.back()->initialize();
  return *arenas.back();
}

}  // namespace

Backend default_backend() { return static_cast<Backend>(chosen_backend().load()); }
void set_default_backend(Backend backend) { chosen_backend() = static_cast<int>(backend); }
const char* backend_name(Backend backend) {
  return backend == Backend::reference ? "reference" : "cpu";
}

int num_threads() {
  int limit = thread_limit();
  int cores = std::max(1u, std::thread::hardware_concurrency());
  return limit > 0 ? std::min(limit, 4 * cores) : cores;
}

void set_num_threads(int n) {
  require(n >= 0, "[set_num_threads] n: got ", n, ", wanted 0 (every core) or more");
  thread_limit() = n;
}

namespace detail {
void parallel_for_impl(long n, void (*call)(const void* context, long i), const void* context) {
  int threads = num_threads();
  if (n <= 1 || threads == 1) {
    for (long i = 0; i < n; ++i) call(context, i);
    return;
  }
  // TBB orders the caller, the workers and the return by itself, out of ThreadSanitizer's sight
  // (Debian's library is not instrumented); this counter says the same in C++.
  std::atomic<long> n_done{0};
  n_done.store(0, std::memory_order_release);
  arena(threads).execute([&] {
    tbb::parallel_for(
        tbb::blocked_range<long>(0, n, 1),
        [&](const tbb::blocked_range<long>& range) {
          n_done.load(std::memory_order_acquire);
          for (long i = range.begin(); i != range.end(); ++i) call(context, i);
          n_done.fetch_add(1, std::memory_order_acq_rel);
        },
        tbb::simple_partitioner());
  });
  n_done.load(std::memory_order_acquire);
}
}  // namespace detail

bool debug_enabled() {
  static const bool enabled =
      environment_flag("VELOXQUANT_DEBUG") || environment_flag("MLX_METAL_DEBUG");
  return enabled;
}

void log_once(const std::string& text) {
  if (!debug_enabled()) return;
  static std::mutex mutex;
  static std::set<std::string> seen;
  std::lock_guard<std::mutex> lock(mutex);
  if (seen.insert(text).second) std::fprintf(stderr, "[veloxquant] %s\n", text.c_str());
}

std::vector<std::string> simd_levels() { return cpu::supported_targets(); }
std::string simd_level() { return cpu::current_target(); }
void set_simd_level(const std::string& level) { cpu::restrict_target(level); }

}  // namespace veloxquant
