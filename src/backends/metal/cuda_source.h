// A kernel as a whole program for NVRTC, with a signature of our own: what the library launches
// without MLX. The body sees its arrays as MLX would show them.
#pragma once

#include <string>
#include <vector>

#include "src/backends/metal/cuda_text.h"

namespace veloxquant::metal {

// How an input reaches the kernel. Outputs are pointers.
struct CudaInput {
  Type type = Type::float32;
  int ndim = 1;
  int by_value = 0;  // > 0: so many numbers travel with the launch
};

// Which numbers of an input follow it in the signature: int32 [ndim] its shape, int64 [ndim] its
// strides in elements.
struct CudaNames {
  bool shape = false, strides = false;
};
CudaNames names_of(const Kernel& kernel, const std::string& input);

// Types of outputs and template arguments are those of the launch; shapes and the grid are no part
// of the text, only the threads of a block are. A kernel of single threads has one input more, the
// grid, by value (cuda_text.h). The function is extern "C", named kCudaEntry.
constexpr const char* kCudaEntry = "vq_kernel";
std::string cuda_program(const Call& call, const std::vector<CudaInput>& inputs);

}  // namespace veloxquant::metal
