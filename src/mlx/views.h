// MLX arrays as tensor views of the core.
#pragma once

#include <mlx/array.h>
#include <mlx/stream.h>
#include <mlx/utils.h>

#include <string>

#include "veloxquant/tensor_view.h"

namespace veloxquant {

DType dtype_of(mlx::core::Dtype dtype);  // throws Error for a dtype that the core has not
mlx::core::Dtype mlx_dtype(DType dtype);
std::string dtype_text(mlx::core::Dtype dtype);
std::string shape_text(const mlx::core::array& a);  // "float16 [2, 3]", for error texts

// Views of evaluated (or allocated) arrays, strides included.
TensorView view_of(const mlx::core::array& a);
MutableTensorView mutable_view_of(mlx::core::array& a);

// The CPU stream that an operation runs on: the given or current one where it is a CPU stream,
// else the default CPU stream.
mlx::core::Stream cpu_stream(mlx::core::StreamOrDevice s);

}  // namespace veloxquant
