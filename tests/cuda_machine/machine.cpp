#include "tests/cuda_machine/machine.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace cuda_machine {

namespace {
constexpr size_t kStackBytes = size_t{256} << 10;
constexpr int kIdleTurns = 10000;
}  // namespace

Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

void Machine::begin_fiber() {
  Machine& self = machine();
  try {
    (*self.kernel_)();
  } catch (...) {
    self.error_ = std::current_exception();
  }
  self.fiber().done = true;
  for (;;) self.yield();
}

void Machine::run_cta() {
  const int n_threads = static_cast<int>(fibers_.size());
  for (int t = 0; t < n_threads; ++t) {
    Fiber& fiber = fibers_[t];
    fiber.done = false;
    fiber.generation = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks_[t].data();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Machine::begin_fiber, 0);
  }
  warps_.assign(n_threads / kLanes, Warp{});
  barriers_.assign(kBarriers, Barrier{});
  std::vector<int> order(warps_.size());
  std::iota(order.begin(), order.end(), 0);
  int running = n_threads, idle = 0;
  while (running > 0) {
    bool progress = false;
    std::shuffle(order.begin(), order.end(), random);
    for (int warp : order) {
      if (random() % 4 == 0) {  // now and then a warp falls behind
        progress = true;
        continue;
      }
      const int first = static_cast<int>(random() % kLanes);
      for (int l = 0; l < kLanes; ++l) {
        const int t = warp * kLanes + (first + l) % kLanes;
        Fiber& fiber = fibers_[t];
        if (fiber.done || (fiber.generation != nullptr && *fiber.generation == fiber.before))
          continue;
        progress = true;
        thread.x = t;
        swapcontext(&scheduler_, &fiber.context);
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
        running -= fiber.done;
      }
    }
    if (copy_ && random() % 8 == 0) {
      std::exchange(copy_, nullptr)();
      progress = true;
    }
    idle = progress ? 0 : idle + 1;
    if (idle > kIdleTurns) throw std::logic_error("threads wait for each other");
  }
  if (copy_) throw std::logic_error("a copy arrives after its CTA's end");
  for (const Barrier& barrier : barriers_) {
    if (barrier.arrived > 0) throw std::logic_error("a barrier is left with threads at it");
  }
}

void Machine::run(int n_ctas, int n_threads, char* shared, int shared_bytes,
                  const std::function<void()>& kernel) {
  kernel_ = &kernel;
  shared_ = shared;
  grid.x = n_ctas;
  fibers_.resize(n_threads);
  stacks_.resize(std::max<size_t>(stacks_.size(), n_threads));
  for (auto& stack : stacks_) stack.resize(kStackBytes);
  std::vector<int> order(n_ctas);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (int cta : order) {
    block.x = cta;
    std::memset(shared, 0xff, shared_bytes);
    run_cta();
  }
}

}  // namespace cuda_machine
