#include "veloxquant/tensor_view.h"

namespace veloxquant {

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::float16:
      return "float16";
    case DType::bfloat16:
      return "bfloat16";
    case DType::uint8:
      return "uint8";
    case DType::uint16:
      return "uint16";
    case DType::int32:
      return "int32";
    case DType::boolean:
      return "bool";
  }
  return "unknown";
}

}  // namespace veloxquant
