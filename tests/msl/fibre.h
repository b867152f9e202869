// Threads of a threadgroup: stacks of their own on one thread of the CPU, switched by hand.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace veloxquant::msl {

class Fibres {
 public:
  Fibres() = default;
  ~Fibres();
  Fibres(const Fibres&) = delete;
  Fibres& operator=(const Fibres&) = delete;

  // n stacks; what ran before is forgotten.
  void reset(int n);
  // Runs fibre i until it yields or body(i) returns; false once it has returned.
  bool resume(int i, void (*body)(int));
  // Called by the running fibre.
  void yield();
  // Whether the address lies on a stack.
  bool contains(uintptr_t address) const { return address - arena_ < arena_bytes_; }

 private:
  struct Context {
    void* stack_pointer = nullptr;
    void (*body)(int) = nullptr;
    int index = 0;
    bool done = false;
  };
  static void start();

  uintptr_t arena_ = 0;
  size_t arena_bytes_ = 0;
  std::vector<Context> contexts_;
  Context* running_ = nullptr;
  void* scheduler_ = nullptr;  // its stack pointer
};

}  // namespace veloxquant::msl
