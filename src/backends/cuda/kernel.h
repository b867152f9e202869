// A kernel of the shared text on a CUDA device: compiled once for each device and text, launched
// with raw pointers on a caller's stream.
#pragma once

#include <array>
#include <span>
#include <vector>

#include "src/backends/metal/cuda_source.h"

namespace veloxquant::backends {

// An input: a device pointer, or where it travels by value the numbers themselves, on the host.
// Only kernels that ask for shapes and strides read them.
struct CudaArgument {
  const void* data = nullptr;
  std::array<int32_t, 4> shape{};
  std::array<int64_t, 4> strides{};
};

class CudaKernel {
 public:
  // The kernel of a call on the current device, compiled if it was not; lives as long as the
  // process. fused: see nvrtc_cubin. Throws Error, also where it would have to be compiled while
  // `stream` is captured.
  static const CudaKernel& get(const metal::Call& call, const std::vector<metal::CudaInput>& inputs,
                               bool fused, void* stream);

  // Blocks and threads as the launch of `call` says; text and types must be those of get(). Does
  // not allocate, does not wait.
  void launch(const metal::Launch& launch, std::span<const CudaArgument> inputs,
              std::span<void* const> outputs, void* stream) const;

 private:
  struct Parameter {
    bool by_value, shape, strides;
  };
  const metal::Kernel* kernel_ = nullptr;
  std::vector<Parameter> parameters_;
  size_t n_outputs_ = 0;
  bool single_ = false;
  void* function_ = nullptr;  // CUfunction
};

}  // namespace veloxquant::backends
