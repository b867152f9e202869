#include "src/mlx/views.h"

#include <sstream>

namespace veloxquant {
namespace mx = mlx::core;

std::string dtype_text(mx::Dtype dtype) {
  std::ostringstream text;
  text << dtype;
  return text.str();
}

std::string shape_text(const mx::array& a) {
  std::string text = dtype_text(a.dtype()) + " [";
  for (int d = 0; d < static_cast<int>(a.ndim()); ++d) {
    text += (d ? ", " : "") + std::to_string(a.shape(d));
  }
  return text + "]";
}

DType dtype_of(mx::Dtype dtype) {
  if (dtype == mx::float32) return DType::float32;
  if (dtype == mx::float16) return DType::float16;
  if (dtype == mx::bfloat16) return DType::bfloat16;
  if (dtype == mx::uint8) return DType::uint8;
  if (dtype == mx::uint16) return DType::uint16;
  if (dtype == mx::int32) return DType::int32;
  if (dtype == mx::bool_) return DType::boolean;
  fail("[mlx] dtype: got ", dtype_text(dtype),
       ", wanted float32, float16, bfloat16, uint8, uint16, int32 or bool");
}

mx::Dtype mlx_dtype(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return mx::float32;
    case DType::float16:
      return mx::float16;
    case DType::bfloat16:
      return mx::bfloat16;
    case DType::uint8:
      return mx::uint8;
    case DType::uint16:
      return mx::uint16;
    case DType::int32:
      return mx::int32;
    case DType::boolean:
      return mx::bool_;
  }
  fail("[mlx] dtype: got an unknown one");
}

namespace {

template <class View, class Array>
View make_view(Array& a) {
  View view;
  require(static_cast<int>(a.ndim()) <= kMaxDims, "[mlx] array: got ", a.ndim(),
          " dimensions, wanted at most ", kMaxDims);
  view.data = a.template data<uint8_t>();
  view.dtype = dtype_of(a.dtype());
  view.ndim = static_cast<int>(a.ndim());
  for (int d = 0; d < view.ndim; ++d) {
    view.shape[d] = a.shape(d);
    view.stride[d] = a.strides()[d];
  }
  return view;
}

}  // namespace

TensorView view_of(const mx::array& a) { return make_view<TensorView>(a); }
MutableTensorView mutable_view_of(mx::array& a) { return make_view<MutableTensorView>(a); }

mx::Stream cpu_stream(mx::StreamOrDevice s) {
  mx::Stream stream = mx::to_stream(s);
  if (stream.device == mx::Device::cpu) return stream;
  return mx::default_stream(mx::Device::cpu);
}

}  // namespace veloxquant
