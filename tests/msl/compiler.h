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
};

// Checks the dialect, compiles with address spaces (warnings are errors), compiles to run, loads.
// Throws Fault with the compiler's messages.
Compiled compile(const metal::Kernel& kernel, const metal::Launch& launch,
                 const std::vector<metal::ArrayShape>& inputs);

}  // namespace veloxquant::msl
