// The environment variables that choose how the library computes, read and checked together: a
// mistake in any of them is an Error at first use of the library, not in the midst of a sequence.
#pragma once

#include <functional>
#include <string>

#include "veloxquant/backend.h"

namespace veloxquant {

struct Environment {
  Backend backend = Backend::cpu;  // VELOXQUANT_BACKEND
  std::string simd;                // VELOXQUANT_SIMD: a level, or empty; simd_targets.cpp checks it
  int threads = 0;                 // VELOXQUANT_THREADS; 0: every core
  bool lookups_in_registers = true;  // VELOXQUANT_LOOKUPS
  bool debug = false;                // VELOXQUANT_DEBUG, MLX_METAL_DEBUG
};

// get: as std::getenv. Throws Error for what is none of a variable's values.
Environment environment_of(const std::function<const char*(const char*)>& get);

// That of the process, read at first use.
const Environment& environment();

}  // namespace veloxquant
