// CUDA's runtime as far as the decode kernels and tools/gpu/problem.cpp call it, on host memory.
#include "tests/cuda_machine/runtime.h"

#include <cstdlib>
#include <cstring>

#include "src/codecs/vecinfer/cuda_layout.h"
#include "veloxquant/cuda.h"

extern "C" {
cudaError_t cudaMalloc(void** at, size_t bytes) {
  constexpr size_t kPage = 4096;
  *at = std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage);
  return *at == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFree(void* at) {
  std::free(at);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* at, int byte, size_t bytes) {
  std::memset(at, byte, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "an error of the CUDA machine"; }
cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::strcpy(properties->name, "CUDA machine");
  return cudaSuccess;
}
}

namespace cuda_machine {
veloxquant::backends::Device& device() {
  static veloxquant::backends::Device the_device = {9, 0, 132, 232448, 233472};
  return the_device;
}
}  // namespace cuda_machine

namespace veloxquant {

const backends::Device& backends::current_device() { return cuda_machine::device(); }

// The layout on the host; the kernel that does this is held to it on a GPU (cuda_check).
void cuda::pack_blocks(const SideFormat& format, const uint8_t* portable, int64_t n_pairs,
                       int n_blocks, uint8_t* fragments, int64_t pair_stride, Stream) {
  constexpr int kBlock = 64;
  const int chunks = format.n_chunks, step_bytes = vecinfer::fragment_step_bytes(chunks);
  for (int64_t i = 0; i < n_pairs * n_blocks; ++i) {
    const uint8_t* from = portable + i * format.n_subvectors * kBlock;
    uint8_t* to = fragments + i / n_blocks * pair_stride + i % n_blocks * format.block_bytes();
    for (int m = 0; m < 8 * chunks; ++m) {
      for (int token = 0; token < kBlock; ++token) {
        const int in_step = token % vecinfer::kStepTokens;
        const int at = format.side == Side::keys ? vecinfer::key_offset(chunks, in_step, m)
                                                 : vecinfer::value_offset(chunks, in_step, m);
        to[token / vecinfer::kStepTokens * step_bytes + at] =
            m < format.n_subvectors ? from[m * kBlock + token] : 0;
      }
    }
  }
}

}  // namespace veloxquant
