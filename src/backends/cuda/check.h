// The CUDA device and its errors.
#pragma once

#include <cuda_runtime_api.h>

#include "veloxquant/error.h"

namespace veloxquant::backends {

inline void check(cudaError_t status, const char* what) {
  require(status == cudaSuccess, "[", what, "] CUDA: got ", cudaGetErrorString(status),
          ", wanted success");
}

struct Device {
  int major = 0, minor = 0, multiprocessors = 0;
  int shared_per_block = 0, shared_per_multiprocessor = 0;
};

// The current device; read once for each. Throws Error where there is none, or one older than
// sm_80.
const Device& current_device();

}  // namespace veloxquant::backends
