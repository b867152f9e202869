// A CUDA grid on the host: the threads of a CTA are fibers that run, in random order, from one
// meeting to the next, so that a missing barrier shows as a result that differs.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <utility>
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
    const uint64_t generation = barriers_[barrier].generation;
    arrive(barrier, n_threads);
    if (barriers_[barrier].generation == generation)
      wait(&barriers_[barrier].generation, generation);
  }
  void arrive(int barrier, int n_threads) {
    Barrier& at = barriers_[barrier];
    if (++at.arrived > n_threads) throw std::logic_error("more threads at a barrier than it has");
    if (at.arrived == n_threads) {
      if (barrier == 0) any_ = std::exchange(pending_, false);
      at.arrived = 0;
      ++at.generation;
    }
  }
  void sync_all() { sync(0, static_cast<int>(fibers_.size())); }
  // Whether any of them said so.
  bool sync_all_or(bool x) {
    pending_ |= x;
    sync_all();
    return any_;
  }

  // A copy that is there some time later.
  void copy_for_all(std::function<void()> copy) {
    if (copy_) throw std::logic_error("a copy is sent for while one is under way");
    copy_ = std::move(copy);
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
  bool pending_ = false;  // whether any has said so before the next barrier of all
  bool any_ = false;      // and before the last one
  ucontext_t scheduler_;
  const std::function<void()>* kernel_ = nullptr;
  std::exception_ptr error_;
  std::function<void()> copy_;  // under way
  char* shared_ = nullptr;
};

Machine& machine();

}  // namespace cuda_machine
