// Non-owning views of strided tensors: the only way data enters or leaves the core.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "veloxquant/error.h"

namespace veloxquant {

enum class DType : uint8_t { float32, float16, bfloat16, uint8, uint16, int32, boolean };

inline int dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::float16:
    case DType::bfloat16:
    case DType::uint16:
      return 2;
    default:
      return 1;
  }
}

const char* dtype_name(DType dtype);

constexpr int kMaxDims = 6;

// `Pointer` is `const void*` (input) or `void*` (output). Shapes and strides count elements.
template <class Pointer>
struct BasicTensorView {
  Pointer data = nullptr;
  DType dtype = DType::float32;
  int ndim = 0;
  std::array<int64_t, kMaxDims> shape{};
  std::array<int64_t, kMaxDims> stride{};

  BasicTensorView() = default;

  // A row-major view.
  BasicTensorView(Pointer data, DType dtype, std::initializer_list<int64_t> dims)
      : data(data), dtype(dtype), ndim(static_cast<int>(dims.size())) {
    require(ndim <= kMaxDims, "[TensorView] shape: got ", ndim, " dimensions, wanted at most ",
            kMaxDims);
    int i = 0;
    for (int64_t n : dims) shape[i++] = n;
    int64_t step = 1;
    for (int d = ndim - 1; d >= 0; --d) {
      stride[d] = step;
      step *= shape[d];
    }
  }

  bool empty() const { return data == nullptr; }

  int64_t size() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }

  int64_t nbytes() const { return size() * dtype_bytes(dtype); }

  // Address of element (i, j, ...): fewer indices than dimensions point at a sub-tensor.
  template <class... Index>
  Pointer at(Index... index) const {
    int64_t offset = 0;
    int d = 0;
    ((offset += static_cast<int64_t>(index) * stride[d++]), ...);
    using Byte =
        std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const uint8_t, uint8_t>;
    return static_cast<Byte*>(data) + offset * dtype_bytes(dtype);
  }
};

using TensorView = BasicTensorView<const void*>;
using MutableTensorView = BasicTensorView<void*>;

inline TensorView read_only(const MutableTensorView& view) {
  TensorView out;
  out.data = view.data;
  out.dtype = view.dtype;
  out.ndim = view.ndim;
  out.shape = view.shape;
  out.stride = view.stride;
  return out;
}

}  // namespace veloxquant
