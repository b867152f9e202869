#include "src/backends/metal/cuda_text.h"

#include <climits>

#include "src/backends/metal/prune.h"
#include "src/backends/metal/source.h"

namespace veloxquant::metal {
namespace {

constexpr int kBlock = 256;          // threads of a block where they are single
constexpr int kMaxBlocksYZ = 65535;  // CUDA's second and third dimension
constexpr int kMaxBlockThreads = 1024;

bool names(const std::string& text, const char* word) {
  return text.find(word) != std::string::npos;
}

int64_t grid_threads(const Launch& launch) {
  return int64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2];
}

// Metal's attributes out of CUDA's indices.
constexpr struct {
  const char *name, *grouped;
} kAttributes[] = {
    {"thread_position_in_grid",
     "const uint3 thread_position_in_grid = {blockIdx.x * blockDim.x + threadIdx.x, "
     "blockIdx.y * blockDim.y + threadIdx.y, blockIdx.z * blockDim.z + threadIdx.z};"},
    {"threads_per_grid",
     "const uint3 threads_per_grid = {gridDim.x * blockDim.x, gridDim.y * blockDim.y, "
     "gridDim.z * blockDim.z};"},
    {"threadgroup_position_in_grid",
     "const uint3 threadgroup_position_in_grid = {blockIdx.x, blockIdx.y, blockIdx.z};"},
    {"threadgroups_per_grid",
     "const uint3 threadgroups_per_grid = {gridDim.x, gridDim.y, gridDim.z};"},
    {"thread_position_in_threadgroup",
     "const uint3 thread_position_in_threadgroup = {threadIdx.x, threadIdx.y, threadIdx.z};"},
    {"threads_per_threadgroup",
     "const uint3 threads_per_threadgroup = {blockDim.x, blockDim.y, blockDim.z};"},
    {"thread_index_in_threadgroup",
     "const uint thread_index_in_threadgroup = threadIdx.x + blockDim.x * (threadIdx.y + "
     "blockDim.y * threadIdx.z);"},
    {"thread_index_in_simdgroup",
     "const uint thread_index_in_simdgroup = (threadIdx.x + blockDim.x * (threadIdx.y + "
     "blockDim.y * threadIdx.z)) % 32;"},
    {"simdgroup_index_in_threadgroup",
     "const uint simdgroup_index_in_threadgroup = (threadIdx.x + blockDim.x * (threadIdx.y + "
     "blockDim.y * threadIdx.z)) / 32;"},
};

constexpr const char* kSingle = R"(
  const uint3 threads_per_grid = {(uint)vq_grid[0], (uint)vq_grid[1], (uint)vq_grid[2]};
  const uint vq_thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (vq_thread >= threads_per_grid.x * threads_per_grid.y * threads_per_grid.z) return;
  const uint3 thread_position_in_grid = {
      vq_thread % threads_per_grid.x, vq_thread / threads_per_grid.x % threads_per_grid.y,
      vq_thread / threads_per_grid.x / threads_per_grid.y};
)";

}  // namespace

bool threads_are_single(const Kernel& kernel) {
  return names(kernel.body, "thread_position_in_grid") && !names(kernel.body, "threadgroup") &&
         !names(kernel.body, "simdgroup");
}

Kernel cuda_kernel_of(const Kernel& kernel) {
  Kernel cuda = kernel;
  const std::string prelude = flattened("src/backends/metal/cuda_prelude.h");
  cuda.header = flush_left(needed_by(kernel.header + kernel.body, prelude)) + kernel.header;
  std::string attributes;
  if (threads_are_single(kernel)) {
    cuda.inputs.push_back(kGridInput);
    attributes = kSingle;
  } else {
    for (const auto& attribute : kAttributes) {
      if (!names(kernel.body, attribute.name)) continue;
      attributes += std::string("\n  ") + attribute.grouped;
    }
    attributes += "\n";
  }
  cuda.body = attributes + kernel.body;
  return cuda;
}

CudaGrid cuda_grid_of(const Kernel& kernel, const Launch& launch) {
  if (!threads_are_single(kernel)) return {launch.grid, launch.threadgroup};
  const int64_t blocks = (grid_threads(launch) + kBlock - 1) / kBlock;
  return {{static_cast<int>(blocks * kBlock), 1, 1}, {kBlock, 1, 1}};
}

std::optional<std::string> no_cuda_launch_because(const Kernel& kernel, const Launch& launch) {
  if (threads_are_single(kernel)) {
    if (grid_threads(launch) > INT_MAX - kBlock) return "more threads than one launch takes";
    return std::nullopt;
  }
  const auto& [x, y, z] = launch.threadgroup;
  if (x * y * z > kMaxBlockThreads) return "more than 1024 threads in a threadgroup";
  for (int d = 0; d < 3; ++d) {
    if (launch.grid[d] % launch.threadgroup[d] != 0) return "a grid of broken threadgroups";
    if (d > 0 && launch.grid[d] / launch.threadgroup[d] > kMaxBlocksYZ) {
      return "more than 65535 threadgroups in the second or third dimension";
    }
  }
  return std::nullopt;
}

}  // namespace veloxquant::metal
