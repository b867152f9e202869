#include <mlx/array.h>
#include <mlx/utils.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/variant.h>

#include "python/bindings/module.h"
#include "src/mlx/sign_ops.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace veloxquant {

void bind_signs(nb::module_& m) {
  m.def("rabitq_hamming_score", &rabitq_hamming_score_op, "qbits"_a, "bits"_a, "cx"_a, "scale"_a,
        "stream"_a = nb::none());
  m.def("rabitq_encode", &rabitq_encode_op, "x"_a, "seed"_a, "stream"_a = nb::none());
  m.def("rabitq_popcount_score", &rabitq_popcount_score_op, "q"_a, "codes"_a, "factors"_a, "seed"_a,
        "query_bits"_a, "stream"_a = nb::none());
  m.def("qjl_encode", &qjl_encode_op, "x"_a, "sketch"_a, "stream"_a = nb::none());
  m.def("qjl_inner_product", &qjl_inner_product_op, "q_proj"_a, "packed_signs"_a, "norms"_a,
        "stream"_a = nb::none());
  m.def("qjl_sketch", &qjl_sketch_op, "dim"_a, "m"_a, "seed"_a, "stream"_a = nb::none());
}

}  // namespace veloxquant
