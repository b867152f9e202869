// The worker threads of parallel_for, on oneTBB.
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "veloxquant/backend.h"

namespace veloxquant {
namespace {

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

}  // namespace veloxquant
