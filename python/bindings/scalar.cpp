#include <mlx/array.h>
#include <mlx/utils.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>

#include "python/bindings/module.h"
#include "src/mlx/scalar_ops.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace veloxquant {
namespace mx = mlx::core;
namespace {

ScalarScale scale_named(const std::string& name) {
  if (name == "norm_corrected") return ScalarScale::norm_corrected;
  if (name == "raw") return ScalarScale::raw;
  if (name == "unbiased") return ScalarScale::unbiased;
  fail("[turboquant_scalar_quantize] scale: got '", name,
       "', wanted norm_corrected, raw or unbiased");
}

ScalarQuantParams params_of(int dim, int bits, const std::string& scale, bool rotate,
                            int64_t seed) {
  require(seed >= 0, "[turboquant_hadamard_quantize] seed: got ", seed, ", wanted at least 0");
  return {dim, bits, scale_named(scale), rotate, static_cast<uint64_t>(seed)};
}

}  // namespace

void bind_scalar(nb::module_& m) {
  m.def(
      "scalar_quantize",
      [](const mx::array& x, int bits, const std::string& scale, bool rotate, int64_t seed,
         mx::StreamOrDevice s) {
        const char* name = rotate ? "turboquant_hadamard_quantize" : "turboquant_scalar_quantize";
        return scalar_quantize_op(name, x, params_of(0, bits, scale, rotate, seed), s);
      },
      "x"_a, "bits"_a, "scale"_a = "norm_corrected", "rotate"_a = false, "seed"_a = 0,
      "stream"_a = nb::none(), "-> (uint32 words [..., W], float16 scalars [...])");
  m.def(
      "scalar_dequantize",
      [](const mx::array& words, const mx::array& scalars, int dim, int bits, bool rotate,
         int64_t seed, mx::Dtype dtype, mx::StreamOrDevice s) {
        return scalar_dequantize_op(words, scalars,
                                    params_of(dim, bits, "norm_corrected", rotate, seed), dtype, s);
      },
      "words"_a, "scalars"_a, "dim"_a, "bits"_a, "rotate"_a, "seed"_a, "dtype"_a,
      "stream"_a = nb::none());
  m.def(
      "nearest_scalar",
      [](const mx::array& x, const mx::array& centroids, int bits, mx::StreamOrDevice s) {
        return nearest_scalar_op(x, centroids, bits, s);
      },
      "x"_a, "centroids"_a, "bits"_a, "stream"_a = nb::none());
  m.def(
      "hadamard_nearest",
      [](const mx::array& x, const mx::array& diag, const mx::array& centroids, int bits,
         mx::StreamOrDevice s) { return hadamard_nearest_op(x, diag, centroids, bits, s); },
      "x"_a, "diag"_a, "centroids"_a, "bits"_a, "stream"_a = nb::none());
  m.def(
      "scalar_centroids",
      [](const mx::array& indices, const mx::array& centroids, mx::StreamOrDevice s) {
        return scalar_centroids_op(indices, centroids, s);
      },
      "indices"_a, "centroids"_a, "stream"_a = nb::none());
  m.def(
      "pack_words",
      [](const mx::array& indices, int bits, mx::StreamOrDevice s) {
        return pack_words_op(indices, bits, s);
      },
      "indices"_a, "bits"_a, "stream"_a = nb::none());
  m.def(
      "unpack_words",
      [](const mx::array& packed, int bits, int64_t n, mx::StreamOrDevice s) {
        return unpack_words_op(packed, bits, n, s);
      },
      "packed"_a, "bits"_a, "n"_a, "stream"_a = nb::none());
  m.def(
      "pack_bytes",
      [](const mx::array& indices, int bits, mx::StreamOrDevice s) {
        return pack_bytes_op(indices, bits, s);
      },
      "indices"_a, "bits"_a, "stream"_a = nb::none());
  m.def(
      "unpack_bytes",
      [](const mx::array& packed, int64_t n, int bits, mx::StreamOrDevice s) {
        return unpack_bytes_op(packed, n, bits, s);
      },
      "packed"_a, "n"_a, "bits"_a, "stream"_a = nb::none());
  m.def(
      "rvq_attend",
      [](const mx::array& q, const mx::array& keys1, const mx::array& keys2,
         const mx::array& centroids1, const mx::array& centroids2, const mx::array& values,
         const mx::array& value_table, int b1, int b2, int bv, std::optional<float> scale,
         bool causal, int64_t sliding_window, const std::optional<mx::array>& key_norms,
         const std::optional<mx::array>& mask, mx::StreamOrDevice s) {
        RvqAttendOptions options{b1, b2, bv, scale, causal, sliding_window, key_norms, mask};
        return rvq_attend_op(q, keys1, keys2, centroids1, centroids2, values, value_table, options,
                             s);
      },
      "q"_a, "keys1"_a, "keys2"_a, "centroids1"_a, "centroids2"_a, "values"_a, "value_table"_a,
      "b1"_a, "b2"_a, "bv"_a, "scale"_a = nb::none(), "causal"_a = false, "sliding_window"_a = 0,
      "key_norms"_a = nb::none(), "mask"_a = nb::none(), "stream"_a = nb::none());
}

}  // namespace veloxquant
