// A kernel's launch that may overlap the end of the kernel ahead of it on the stream.
#pragma once

#include "src/backends/cuda/check.h"

namespace veloxquant::backends {

// 10 times the architecture that the kernel's code is for: 800, 900.
template <class Params>
int code_architecture(void (*kernel)(Params)) {
  cudaFuncAttributes code;
  check(cudaFuncGetAttributes(&code, kernel), "cuda");
  return 10 * code.binaryVersion;
}

// The kernel waits for the end of the one ahead itself.
template <class Params>
void start_early(void (*kernel)(Params), const Params& params, int n_ctas, int n_threads,
                 int shared_bytes, const Device& device, cudaStream_t stream, const char* what) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        what);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(n_ctas);
  config.blockDim = dim3(n_threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = device.major >= 9 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params), what);
}

}  // namespace veloxquant::backends
