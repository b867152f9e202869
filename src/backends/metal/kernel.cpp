#include "src/backends/metal/kernel.h"

namespace veloxquant::metal {

const char* type_name(Type type) {
  switch (type) {
    case Type::boolean:
      return "bool";
    case Type::uint8:
      return "uint8_t";
    case Type::uint16:
      return "uint16_t";
    case Type::uint32:
      return "uint32_t";
    case Type::int32:
      return "int32_t";
    case Type::int64:
      return "int64_t";
    case Type::float16:
      return "float16_t";
    case Type::bfloat16:
      return "bfloat16_t";
    default:
      return "float";
  }
}

int type_bytes(Type type) {
  switch (type) {
    case Type::boolean:
    case Type::uint8:
      return 1;
    case Type::uint16:
    case Type::float16:
    case Type::bfloat16:
      return 2;
    case Type::int64:
      return 8;
    default:
      return 4;
  }
}

}  // namespace veloxquant::metal
