// Kernel text to a function: clang compiles it, the result is kept by its hash.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/backends/metal/kernel.h"

namespace veloxquant::msl {

struct Compiled {
  void (*entry)(void* const* buffers) = nullptr;
  uintptr_t begin = 0, end = 0;  // where its code and constants lie
  // Compiled to be counted (count.py): how often each basic block ran, what it executes.
  uint64_t* counts = nullptr;
  const uint32_t (*weights)[3] = nullptr;
  int n_blocks = 0;
};

// Checks the dialect, compiles with address spaces (warnings are errors), compiles to run, loads.
// Throws Fault with the compiler's messages. counting: operations are counted, accesses not seen.
Compiled compile(const metal::Kernel& kernel, const metal::Launch& launch,
                 const std::vector<metal::ArrayShape>& inputs, bool counting = false);

}  // namespace veloxquant::msl
