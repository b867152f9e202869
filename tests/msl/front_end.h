// From the strings that MLX is given to the text that a compiler gets: MLX's own generated source,
// letter for letter, then what clang needs to compile it, and the rules of the language that clang
// does not know.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "src/backends/metal/kernel.h"

namespace veloxquant::msl {

// Anything that a Mac would refuse, or that the machine caught.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The attributes that MLX offers, in its order; the machine numbers them likewise.
struct Attribute {
  const char* name;
  bool is_vector;
};
const std::vector<Attribute>& attributes();

// The source that mlx::core::fast::metal_kernel compiles (without its own utilities in front).
// inputs: type and shape of each.
std::string mlx_source(const metal::Kernel& kernel, const metal::Launch& launch,
                       const std::vector<metal::ArrayShape>& inputs);
std::string mlx_function_name(const metal::Kernel& kernel, const metal::Launch& launch,
                              const std::vector<metal::ArrayShape>& inputs);

// Which of NAME_shape, NAME_strides, NAME_ndim the body asks for.
struct Extras {
  bool shape = false, strides = false, ndim = false;
};
Extras extras_of(const metal::Kernel& kernel, size_t input);

// Text for clang. check: with address spaces, to be compiled only; else with an entry point
// `void msl_entry(void* const* buffers)` that runs one thread.
std::string clang_source(const metal::Kernel& kernel, const metal::Launch& launch,
                         const std::vector<metal::ArrayShape>& inputs, bool check);

// Throws Fault for what Apple's compiler refuses and clang would take: pointers without an address
// space, lambdas, threadgroup variables outside the kernel.
void check_dialect(const metal::Kernel& kernel);

}  // namespace veloxquant::msl
