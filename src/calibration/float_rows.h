// Rows of [H, N, D] tensors of any float dtype and any strides.
#pragma once

#include "src/math/float16.h"
#include "veloxquant/tensor_view.h"

namespace veloxquant {

inline void require_float_rows(const TensorView& x, const char* function) {
  require(!x.empty() && x.ndim == 3 && x.shape[0] >= 1 && x.shape[1] >= 1 && x.shape[2] >= 1, "[",
          function, "] x: got ", x.ndim, " dimensions with ", x.empty() ? 0 : x.size(),
          " elements, wanted [H, N, D] with H, N, D >= 1");
  require(x.dtype == DType::float32 || x.dtype == DType::float16 || x.dtype == DType::bfloat16, "[",
          function, "] x: got ", dtype_name(x.dtype), ", wanted float32, float16 or bfloat16");
}

inline void read_row(const TensorView& x, int64_t head, int64_t token, float* row) {
  const int64_t dims = x.shape[2], step = x.stride[2];
  if (x.dtype == DType::float32) {
    const auto* from = static_cast<const float*>(x.at(head, token));
    for (int64_t i = 0; i < dims; ++i) row[i] = from[i * step];
  } else {
    const auto* from = static_cast<const uint16_t*>(x.at(head, token));
    const bool half = x.dtype == DType::float16;
    for (int64_t i = 0; i < dims; ++i) {
      row[i] = half ? f16_to_f32(from[i * step]) : bf16_to_f32(from[i * step]);
    }
  }
}

}  // namespace veloxquant
