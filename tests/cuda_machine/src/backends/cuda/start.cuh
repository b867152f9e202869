// src/backends/cuda/start.cuh for the host: the kernel runs on the machine.
#pragma once

#include "src/backends/cuda/check.h"
#include "tests/cuda_machine/machine.h"

namespace veloxquant::backends {

extern char* const machine_memory;  // shared memory of a CTA: what the kernels declare as such

template <class Params>
int code_architecture(void (*)(Params)) {
  return VELOXQUANT_MACHINE_ARCH;
}

template <class Params>
void start_early(void (*kernel)(Params), const Params& params, int n_ctas, int n_threads,
                 int shared_bytes, const Device&, cudaStream_t, const char*) {
  cuda_machine::machine().run(n_ctas, n_threads, machine_memory, shared_bytes,
                              [&] { kernel(params); });
}

}  // namespace veloxquant::backends
