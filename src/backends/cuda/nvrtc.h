// NVRTC, loaded when a kernel is first compiled: the library links without it and without libcuda.
#pragma once

#include <string>

namespace veloxquant::backends {

// The machine code of a program for compute capability `architecture` (90: 9.0). fused: multiply
// and add may become one operation. Throws Error with the first lines of NVRTC's log, or where no
// libnvrtc is found: $VELOXQUANT_NVRTC (a path) is tried first, then the loader's own search, then
// the toolkit's usual place.
std::string nvrtc_cubin(const std::string& program, int architecture, bool fused);

}  // namespace veloxquant::backends
