// Rows of [H, N, D] tensors of any float dtype and any strides.
#pragma once

#include <cmath>
#include <vector>

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

// Of each token of each head of x, or empty: every token counts 1.
inline void require_token_weights(const TensorView& weights, const TensorView& x,
                                  const char* function) {
  if (weights.empty()) return;
  require(weights.dtype == DType::float32 && weights.ndim == 2 && weights.shape[0] == x.shape[0] &&
              weights.shape[1] == x.shape[1],
          "[", function, "] token_weights: got ", dtype_name(weights.dtype), " with ", weights.ndim,
          " dimensions, wanted float32 [", x.shape[0], ", ", x.shape[1], "]");
  for (int64_t h = 0; h < x.shape[0]; ++h) {
    for (int64_t t = 0; t < x.shape[1]; ++t) {
      const float weight = *static_cast<const float*>(weights.at(h, t));
      require(std::isfinite(weight) && weight > 0.0f, "[", function, "] token_weights: got ",
              weight, ", wanted finite positive weights");
    }
  }
}

// Those of some tokens; empty where there are none.
inline std::vector<float> weights_of(const TensorView& weights, int64_t head,
                                     const std::vector<int64_t>& tokens) {
  std::vector<float> picked;
  for (size_t i = 0; !weights.empty() && i < tokens.size(); ++i) {
    picked.push_back(*static_cast<const float*>(weights.at(head, tokens[i])));
  }
  return picked;
}

}  // namespace veloxquant
