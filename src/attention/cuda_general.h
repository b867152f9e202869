// What the launches of the general CUDA path share: checks, and the inputs of a kernel of the
// shared text.
#pragma once

#include "src/attention/device_codec.h"
#include "src/backends/cuda/kernel.h"
#include "veloxquant/cuda_general.h"

namespace veloxquant::cuda {

inline metal::Type type_of(DType dtype) {
  return dtype == DType::float32   ? metal::Type::float32
         : dtype == DType::float16 ? metal::Type::float16
                                   : metal::Type::bfloat16;
}

inline metal::Type float_type(const char* function, const char* name, DType dtype) {
  require(dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16, "[",
          function, "] ", name, ": got ", dtype_name(dtype),
          ", wanted float32, float16 or bfloat16");
  return type_of(dtype);
}

inline void check_blocks(const char* function, const char* name, const BlockSide& side,
                         const BlockTable& table) {
  require(side.blob != nullptr && side.blocks != nullptr, "[", function, "] ", name,
          ": got no blob or no blocks, wanted device pointers");
  require(side.sequence_stride % 4 == 0 && side.head_stride % 4 == 0 &&
              side.block_stride % 4 == 0 && reinterpret_cast<uintptr_t>(side.blocks) % 4 == 0 &&
              reinterpret_cast<uintptr_t>(side.blob) % 16 == 0,
          "[", function, "] ", name,
          ": got blocks or strides off 4 bytes or a blob off 16, wanted multiples of these");
  require(side.block_stride >= side.codec->block_bytes, "[", function, "] ", name,
          ": got a block_stride of ", side.block_stride, ", wanted at least the ",
          side.codec->block_bytes, " bytes of a block");
  require(table.blocks == nullptr || (table.pool >= 1 && table.stride >= 1), "[", function,
          "] table: got ", table.pool, " blocks in the pool and ", table.stride,
          " numbers a sequence, wanted at least 1 each");
}

// Types, and what a launch passes.
class Inputs {
 public:
  backends::CudaArgument& add(metal::Type type, const void* data,
                              std::initializer_list<int64_t> shape) {
    types_.push_back({type, 4, 0});
    backends::CudaArgument argument;
    argument.data = data;
    int d = 0;
    for (int64_t n : shape) argument.shape[d++] = static_cast<int32_t>(n);
    arguments_.push_back(argument);
    return arguments_.back();
  }
  void add_blob(const BlockSide& side, const attention::BlobArray& array) {
    const void* data = static_cast<const uint8_t*>(side.blob) + array.at;
    backends::CudaArgument& argument = add(array.type, data, {});
    for (size_t d = 0; d < array.shape.size() && d < argument.shape.size(); ++d) {
      argument.shape[d] = static_cast<int32_t>(array.shape[d]);
    }
  }
  void add_numbers(metal::Type type, const void* numbers, int n) {
    types_.push_back({type, 4, n});
    arguments_.push_back({numbers, {}, {}});
  }

  const std::vector<metal::CudaInput>& types() const { return types_; }
  const std::vector<backends::CudaArgument>& arguments() const { return arguments_; }

 private:
  std::vector<metal::CudaInput> types_;
  std::vector<backends::CudaArgument> arguments_;
};

}  // namespace veloxquant::cuda
