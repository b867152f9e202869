// Reading and writing single elements of any float type, and the rounding that the cache applies.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "src/math/float16.h"
#include "veloxquant/tensor_view.h"

namespace veloxquant::attention {

inline bool is_float(DType dtype) {
  return dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16;
}

inline float load_element(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::float16:
      return f16_to_f32(static_cast<const uint16_t*>(data)[index]);
    case DType::bfloat16:
      return bf16_to_f32(static_cast<const uint16_t*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

inline void store_element(void* data, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::float16:
      static_cast<uint16_t*>(data)[index] = f32_to_f16(value);
      break;
    case DType::bfloat16:
      static_cast<uint16_t*>(data)[index] = f32_to_bf16(value);
      break;
    default:
      static_cast<float*>(data)[index] = value;
  }
}

inline float largest_finite(DType dtype) {
  switch (dtype) {
    case DType::float16:
      return 65504.0f;
    case DType::bfloat16:
      return bf16_to_f32(0x7f7f);
    default:
      return std::numeric_limits<float>::max();
  }
}

// What the cache would keep of an exact key or value: rounded to `keep`, NaN as 0, overflow as the
// largest finite value. A token is then seen alike in the call that appends it and ever after.
inline float as_kept(float value, DType keep) {
  if (std::isnan(value)) return 0.0f;
  if (keep == DType::float16) value = f16_to_f32(f32_to_f16(value));
  if (keep == DType::bfloat16) value = bf16_to_f32(f32_to_bf16(value));
  float limit = largest_finite(keep);
  return value > limit ? limit : value < -limit ? -limit : value;
}

}  // namespace veloxquant::attention
