// A GPU kernel as text, and one launch of it, in the terms of mlx::core::fast::metal_kernel but
// without MLX: what src/mlx hands to MLX is what tests/msl compiles and runs on a CPU.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

namespace veloxquant::metal {

enum class Type : uint8_t {
  boolean,
  uint8,
  uint16,
  uint32,
  int32,
  int64,
  float16,
  bfloat16,
  float32
};

// As MLX spells it in a kernel's signature.
const char* type_name(Type type);
int type_bytes(Type type);

// MLX writes the signature: `body` sees its inputs and outputs by name, the attributes whose names
// occur in it (thread_position_in_grid ...), and NAME_shape, NAME_strides, NAME_ndim likewise.
struct Kernel {
  std::string name;  // carries a hash of the text: MLX caches libraries by name
  std::vector<std::string> inputs, outputs;
  std::string header;  // functions; no attribute is visible here
  std::string body;
  bool row_contiguous = true;  // false: strided inputs arrive as they are
};

struct TemplateArgument {
  std::string name;
  std::variant<int, bool, Type> value;
};

struct ArrayShape {
  Type type = Type::float32;
  std::vector<int64_t> shape;

  int64_t size() const {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
  }
  int64_t nbytes() const { return size() * type_bytes(type); }
};

struct Launch {
  std::vector<TemplateArgument> arguments;
  std::array<int, 3> grid{1, 1, 1};  // threads in all, not threadgroups
  std::array<int, 3> threadgroup{1, 1, 1};
  int at_once = 0;     // CUDA: threadgroups that a multiprocessor must hold; 0: as registers allow
  int pool_bytes = 0;  // of kPoolText, which CUDA gets with the launch
  std::vector<ArrayShape> outputs;
};

// A declaration in a kernel's body of memory that may be larger than CUDA's 48 KB of a kernel.
constexpr const char* kPoolText = "threadgroup uint4 pool[POOL];";

struct Call {
  const Kernel* kernel = nullptr;  // built once
  Launch launch;
};

}  // namespace veloxquant::metal
