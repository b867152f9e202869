#include <mlx/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "python/bindings/module.h"
#include "veloxquant/backend.h"
#include "veloxquant/dequantize.h"
#include "veloxquant/error.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace veloxquant {

void bind_runtime(nb::module_& m) {
  m.def("simd_levels", &simd_levels, "SIMD levels this machine can run, best first.");
  m.def("simd_level", &simd_level, "The SIMD level that runs now.");
  m.def("set_simd_level", &set_simd_level, "level"_a,
        "Restrict the CPU kernels to one of simd_levels(); '' lifts the restriction.");
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, "n"_a, "0: every core.");
  m.def("backend", [] { return std::string(backend_name(default_backend())); });
  m.def(
      "set_backend",
      [](const std::string& name) {
        require(name == "cpu" || name == "reference", "[set_backend] name: got '", name,
                "', wanted 'cpu' or 'reference'");
        set_default_backend(name == "cpu" ? Backend::cpu : Backend::reference);
      },
      "name"_a);
  m.def("dequantize_calls", &dequantize_calls,
        "How often packed history was expanded to a dense array in this process.");
  // The import-time check of the MLX ABI: a wrong nanobind or MLX build fails here with TypeError.
  m.def(
      "abi_check", [](const mlx::core::array& a) { return static_cast<int>(a.ndim()); }, "a"_a);
}

}  // namespace veloxquant
