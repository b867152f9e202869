// A CUDA grid on the host: the threads of a CTA are fibers that run, in random order, from one
// meeting to the next, so that a missing barrier shows as a result that differs.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <vector>

namespace cuda_machine {

constexpr int kLanes = 32, kBarriers = 16, kWords = 6;

struct Index {
  unsigned x = 0;
};

struct Fiber {
  ucontext_t context;
  bool done = false;
  const uint64_t* generation = nullptr;  // it waits for this to change from `before`
  uint64_t before = 0;
  std::vector<std::function<void()>> copies;  // asynchronous, not waited for yet
};

// A meeting of the lanes of a warp: what each brings, for two meetings in turn, since a lane may be
// at the next one while others still read.
struct Warp {
  uint32_t words[2][kLanes][kWords];
  int arrived = 0;
  uint64_t generation = 0;
};

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

class Machine {
 public:
  Index thread, block, grid;
  std::mt19937_64 random;

  // Runs `kernel` for every CTA, in random order. Before each, `shared` is filled with NaN.
  void run(int n_ctas, int n_threads, char* shared, int shared_bytes,
           const std::function<void()>& kernel);

  void yield() { swapcontext(&fiber().context, &scheduler_); }

  // All lanes of the warp bring `n` words; what all brought.
  using Words = uint32_t (*)[kWords];
  Words meet(const uint32_t* words, int n) {
    Warp& warp = warps_[thread.x / kLanes];
    const uint64_t generation = warp.generation;
    Words all = warp.words[generation % 2];
    std::memcpy(all[thread.x % kLanes], words, 4 * n);
    if (++warp.arrived == kLanes) {
      warp.arrived = 0;
      ++warp.generation;
    } else {
      wait(&warp.generation, generation);
    }
    return all;
  }

  void sync(int barrier, int n_threads) {
    Barrier& at = barriers_[barrier];
    const uint64_t generation = at.generation;
    if (++at.arrived > n_threads) throw std::logic_error("more threads at a barrier than it has");
    if (at.arrived == n_threads) {
      at.arrived = 0;
      ++at.generation;
    } else {
      wait(&at.generation, generation);
    }
  }
  void sync_all() { sync(0, static_cast<int>(fibers_.size())); }

  // A copy that happens as late as it may: when its thread waits for it.
  void copy_later(std::function<void()> copy) { fiber().copies.push_back(std::move(copy)); }
  void finish_copies() {
    for (const auto& copy : fiber().copies) copy();
    fiber().copies.clear();
  }

  char* shared() const { return shared_; }

 private:
  Fiber& fiber() { return fibers_[thread.x]; }
  void wait(const uint64_t* generation, uint64_t before) {
    fiber().generation = generation;
    fiber().before = before;
    while (*generation == before) yield();
    fiber().generation = nullptr;
  }
  void run_cta();
  static void begin_fiber();

  std::vector<Fiber> fibers_;
  std::vector<std::vector<char>> stacks_;
  std::vector<Warp> warps_;
  std::vector<Barrier> barriers_;
  ucontext_t scheduler_;
  const std::function<void()>* kernel_ = nullptr;
  std::exception_ptr error_;
  char* shared_ = nullptr;
};

Machine& machine();

}  // namespace cuda_machine
