#include "python/core_bindings/module.h"

#include <nanobind/stl/string.h>

#include "veloxquant/backend.h"

namespace veloxquant {

DType dtype_of(nb::dlpack::dtype type, const char* what, const char* name) {
  if (type.lanes == 1) {
    const auto is = [&type](nb::dlpack::dtype_code code, int bits) {
      return type.code == static_cast<uint8_t>(code) && type.bits == bits;
    };
    if (is(nb::dlpack::dtype_code::Float, 32)) return DType::float32;
    if (is(nb::dlpack::dtype_code::Float, 16)) return DType::float16;
    if (is(nb::dlpack::dtype_code::Bfloat, 16)) return DType::bfloat16;
    if (is(nb::dlpack::dtype_code::UInt, 8)) return DType::uint8;
    if (is(nb::dlpack::dtype_code::UInt, 16)) return DType::uint16;
    if (is(nb::dlpack::dtype_code::Int, 32)) return DType::int32;
  }
  fail("[", what, "] ", name, ": got an array of DLPack type ", int{type.code}, " with ",
       int{type.bits}, " bits, wanted float32, float16, bfloat16, uint8, uint16 or int32");
}

DType dtype_named(const std::string& name) {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  fail("[veloxquant] dtype: got '", name, "', wanted float32, float16 or bfloat16");
}

}  // namespace veloxquant

NB_MODULE(_core, m) {
  namespace nb = nanobind;
  using namespace veloxquant;
  // torch.compile keeps what it has seen until the process ends, these objects too.
  nb::set_leak_warnings(false);
  nb::exception<Error>(m, "Error", PyExc_ValueError);
  m.attr("version") = VELOXQUANT_VERSION;
  m.attr("block_tokens") = kBlockTokens;
  m.def("simd_level", &simd_level, "The SIMD level of the CPU kernels.");
  m.def("set_num_threads", &set_num_threads, nb::arg("n"));
  bind_tables(m);
  bind_calibration(m);
  bind_artifacts(m);
  bind_cpu(m);
  bind_cuda(m);
  bind_cuda_general(m);
}
