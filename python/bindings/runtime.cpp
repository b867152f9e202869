#include <mlx/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "python/bindings/module.h"
#include "src/mlx/function_op.h"
#include "veloxquant/backend.h"
#include "veloxquant/dequantize.h"
#include "veloxquant/error.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace veloxquant {
namespace mx = mlx::core;

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
  m.def(
      "copied",
      [](const mx::array& a) {
        return function_op("veloxquant_copied", {dense(a, a.dtype())}, {{a.shape(), a.dtype()}},
                           [](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
                             const auto* from = in[0].data<uint8_t>();
                             auto* to = out[0].data<uint8_t>();
                             parallel_ranges(static_cast<int64_t>(in[0].nbytes()), int64_t{1} << 20,
                                             [&](int64_t begin, int64_t end) {
                                               std::memcpy(to + begin, from + begin, end - begin);
                                             });
                           })[0];
      },
      "a"_a, "A copy on our threads: what benchmarks hold the kernels against.");
  // The import-time check of the MLX ABI: a wrong nanobind or MLX build fails here with TypeError.
  m.def(
      "abi_check", [](const mx::array& a) { return static_cast<int>(a.ndim()); }, "a"_a);
}

}  // namespace veloxquant
