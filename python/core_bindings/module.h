// The parts of veloxquant._core: the core for NumPy and PyTorch, without MLX. Arrays come by
// DLPack.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <optional>
#include <string>

#include "veloxquant/cuda_general.h"
#include "veloxquant/vecinfer.h"

namespace veloxquant {

namespace nb = nanobind;

using CpuArray = nb::ndarray<nb::device::cpu>;
using CudaArray = nb::ndarray<nb::device::cuda>;

DType dtype_of(nb::dlpack::dtype type, const char* what, const char* name);
DType dtype_named(const std::string& name);  // "float32", "float16", "bfloat16"

// Strides in elements, as they come; `what` and `name` are for the Error.
template <class Array>
TensorView view_of(const Array& array, const char* what, const char* name) {
  require(array.ndim() <= kMaxDims, "[", what, "] ", name, ": got ", array.ndim(),
          " dimensions, wanted at most ", kMaxDims);
  TensorView view;
  view.data = array.data();
  view.dtype = dtype_of(array.dtype(), what, name);
  view.ndim = static_cast<int>(array.ndim());
  for (int d = 0; d < view.ndim; ++d) {
    view.shape[d] = static_cast<int64_t>(array.shape(d));
    view.stride[d] = array.stride(d);
  }
  return view;
}

// Writes what Python shares with us.
inline MutableTensorView writable(const TensorView& view) {
  MutableTensorView out;
  out.data = const_cast<void*>(view.data);
  out.dtype = view.dtype;
  out.ndim = view.ndim;
  out.shape = view.shape;
  out.stride = view.stride;
  return out;
}
template <class Array>
MutableTensorView writable(const Array& array, const char* what, const char* name) {
  return writable(view_of(array, what, name));
}

// One side of one layer: its tables and transform, the CPU codec, and what CUDA needs of it: the
// kernels of cuda.h where a side has tables, those of cuda_general.h where it has none.
class SideTables {
 public:
  SideTables(const std::string& side, int n_kv_heads, int head_dim, const CpuArray& tables,
             const std::string& transform, const std::optional<CpuArray>& scale,
             const std::optional<CpuArray>& encode_matrix,
             const std::optional<CpuArray>& query_matrix);

  // A codec that needs no tables.
  explicit SideTables(const CodecSpec& spec);

  const CodecPtr& codec() const { return codec_; }
  Side side() const { return codec_->side(); }
  // What keeps these tables from the CUDA kernels, or nothing.
  const std::string& cuda_problem() const { return cuda_problem_; }
  // Throws Error with cuda_problem().
  const cuda::PreparedSide& prepared() const;
  bool is_general() const { return !general_.empty(); }
  const cuda::GpuCodec& general() const { return general_; }
  const std::vector<uint8_t>& cuda_blob() const;
  int64_t cuda_block_bytes() const;

 private:
  std::vector<uint8_t> tables_;
  std::vector<float> scale_, encode_matrix_, query_matrix_;
  CodecPtr codec_;
  cuda::PreparedSide prepared_;
  cuda::GpuCodec general_;
  std::string cuda_problem_;
};

void bind_tables(nb::module_& m);        // SideTables
void bind_calibration(nb::module_& m);   // fitting transforms and tables
void bind_artifacts(nb::module_& m);     // files of `veloxquant calibrate`
void bind_cpu(nb::module_& m);           // encode, attention on CPU arrays
void bind_cuda(nb::module_& m);          // the same on the device
void bind_cuda_general(nb::module_& m);  // and for sides without tables

}  // namespace veloxquant
