// Backend and SIMD choice, the number of worker threads, the debug log.
#include "veloxquant/backend.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <mutex>
#include <set>
#include <thread>

#include "src/backends/cpu/simd_targets.h"
#include "src/backends/environment.h"
#include "veloxquant/error.h"

namespace veloxquant {
namespace {

std::atomic<int>& chosen_backend() {
  static std::atomic<int> backend{static_cast<int>(environment().backend)};
  return backend;
}

std::atomic<int>& thread_limit() {
  static std::atomic<int> limit{environment().threads};
  return limit;
}

}  // namespace

Backend default_backend() { return static_cast<Backend>(chosen_backend().load()); }
void set_default_backend(Backend backend) { chosen_backend() = static_cast<int>(backend); }
const char* backend_name(Backend backend) {
  return backend == Backend::reference ? "reference" : "cpu";
}

int num_threads() {
  int limit = thread_limit();
  // Asked once: glibc opens a file of /sys for it, some 7 us that every parallel_for would pay.
  static const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return limit > 0 ? std::min(limit, 4 * cores) : cores;
}

void set_num_threads(int n) {
  require(n >= 0, "[set_num_threads] n: got ", n, ", wanted 0 (every core) or more");
  thread_limit() = n;
}

bool debug_enabled() { return environment().debug; }

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
