// What tests of Metal kernels share: values of a kernel's types, and the comparison of bytes.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "src/math/float16.h"
#include "tests/msl/machine.h"
#include "veloxquant/tensor_view.h"

namespace veloxquant::msl {

// All that is counted of a kernel: its operations, and what it asks of memory.
struct Counted {
  Operations operations;
  Traffic traffic;
};
inline Counted counted(const metal::Kernel& kernel, const metal::Launch& launch,
                       const std::vector<Input>& inputs) {
  return {count(kernel, launch, inputs),
          run(kernel, launch, inputs, {.both_orders = false}).report.traffic};
}

inline DType dtype_of(metal::Type type) {
  return type == metal::Type::float32   ? DType::float32
         : type == metal::Type::float16 ? DType::float16
                                        : DType::bfloat16;
}

// Numbers rounded to a type.
struct Values {
  metal::Type type;
  std::vector<float> wide;
  std::vector<uint16_t> narrow;

  Values(std::vector<float> x, metal::Type type) : type(type), wide(std::move(x)) {
    if (type == metal::Type::float32) return;
    for (float& v : wide) {
      narrow.push_back(type == metal::Type::float16 ? f32_to_f16(v) : f32_to_bf16(v));
      v = type == metal::Type::float16 ? f16_to_f32(narrow.back()) : bf16_to_f32(narrow.back());
    }
  }
  const void* data() const {
    return type == metal::Type::float32 ? static_cast<const void*>(wide.data()) : narrow.data();
  }
  Input input(std::vector<int64_t> shape) const { return Input(type, std::move(shape), data()); }
};

inline Input floats(const std::vector<float>& x, std::vector<int64_t> shape) {
  return Input(metal::Type::float32, std::move(shape), x.data());
}

// Equal bytes; the first difference by its place.
template <class T>
::testing::AssertionResult same_bytes(const std::vector<uint8_t>& got, const std::vector<T>& want) {
  if (got.size() != want.size() * sizeof(T)) {
    return ::testing::AssertionFailure()
           << "got " << got.size() << " bytes, wanted " << want.size() * sizeof(T);
  }
  const auto* bytes = reinterpret_cast<const uint8_t*>(want.data());
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i] == bytes[i]) continue;
    T value;
    std::memcpy(&value, &got[i / sizeof(T) * sizeof(T)], sizeof(T));
    return ::testing::AssertionFailure()
           << "element " << i / sizeof(T) << " of " << want.size() << ": got " << +value
           << ", wanted " << +want[i / sizeof(T)];
  }
  return ::testing::AssertionSuccess();
}

}  // namespace veloxquant::msl
