// Bulk conversion between fp32 and the 16-bit floats, the same bits on every SIMD level.
#pragma once

#include <cstdint>

#include "veloxquant/tensor_view.h"

namespace veloxquant::cpu {

// n values of float32, float16 or bfloat16 -> fp32.
void to_float(DType from_dtype, const void* from, int64_t n, float* to);

// fp32 -> float16 or bfloat16, round to nearest even. NaN becomes 0; +-inf and what would overflow
// become the largest finite value of the 16-bit type. Returns how many values were changed so.
int64_t to_finite_16bit(DType to_dtype, const float* from, int64_t n, uint16_t* to);

}  // namespace veloxquant::cpu
