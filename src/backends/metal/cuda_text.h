// The same kernels in the terms of mlx::core::fast::cuda_kernel: MLX writes a __global__ function
// around the body, gives it inputs as metal_kernel does, and knows no attributes.
#pragma once

#include <array>
#include <optional>
#include <string>

#include "src/backends/metal/kernel.h"

namespace veloxquant::metal {

// Metal cuts the last threadgroup to the grid; CUDA launches whole ones. A kernel whose threads are
// on their own (they name thread_position_in_grid and share nothing) is launched as one row of
// threads, those beyond the grid leave: no limit of CUDA's second and third dimension applies. It
// gets the grid as one more input, kGridInput: int32 [3], the last.
constexpr const char* kGridInput = "vq_grid";
bool threads_are_single(const Kernel& kernel);

// Prelude and header, attributes and body, under the same name.
Kernel cuda_kernel_of(const Kernel& kernel);

struct CudaGrid {
  std::array<int, 3> grid{1, 1, 1};  // threads, as MLX wants them
  std::array<int, 3> threadgroup{1, 1, 1};
};
CudaGrid cuda_grid_of(const Kernel& kernel, const Launch& launch);

// Why this launch cannot be made; nothing where it can.
std::optional<std::string> no_cuda_launch_because(const Kernel& kernel, const Launch& launch);

}  // namespace veloxquant::metal
