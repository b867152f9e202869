#include <mlx/array.h>
#include <mlx/utils.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/variant.h>

#include "python/bindings/module.h"
#include "src/mlx/vecinfer_ops.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace veloxquant {
namespace mx = mlx::core;

void bind_vecinfer(nb::module_& m) {
  m.def(
      "vecinfer_quantize",
      [](const mx::array& x, const mx::array& codebook, int sub_dim, mx::StreamOrDevice s) {
        return vecinfer_quantize_op(x, codebook, sub_dim, s);
      },
      "x"_a, "codebook"_a, "sub_dim"_a, "stream"_a = nb::none());
  m.def(
      "vecinfer_dequant",
      [](const mx::array& indices, const mx::array& codebook,
         const std::optional<mx::Dtype>& out_dtype,
         mx::StreamOrDevice s) { return vecinfer_dequant_op(indices, codebook, out_dtype, s); },
      "indices"_a, "codebook"_a, "out_dtype"_a = nb::none(), "stream"_a = nb::none());
  m.def(
      "vecinfer_encode_decode",
      [](const mx::array& keys, const mx::array& codebook, int sub_dim, const mx::array& matrix,
         const std::optional<mx::array>& smooth, mx::StreamOrDevice s) {
        return vecinfer_encode_decode_op("vecinfer_encode_decode_metal", keys, codebook, sub_dim,
                                         matrix, smooth, mx::int32, s);
      },
      "keys"_a, "codebook"_a, "sub_dim"_a, "matrix"_a, "smooth"_a = nb::none(),
      "stream"_a = nb::none());
  m.def(
      "vecinfer_encode_decode_simple",
      [](const mx::array& values, const mx::array& codebook, int sub_dim, mx::StreamOrDevice s) {
        return vecinfer_encode_decode_op("vecinfer_encode_decode_simple_metal", values, codebook,
                                         sub_dim, std::nullopt, std::nullopt, mx::uint32, s);
      },
      "values"_a, "codebook"_a, "sub_dim"_a, "stream"_a = nb::none());
  m.def(
      "vecinfer_query_lut",
      [](const mx::array& q, const mx::array& codebook, int sub_dim, mx::StreamOrDevice s) {
        return vecinfer_query_lut_op(q, codebook, sub_dim, s);
      },
      "q"_a, "codebook"_a, "sub_dim"_a, "stream"_a = nb::none());
}

}  // namespace veloxquant
