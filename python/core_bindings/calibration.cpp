#include "veloxquant/calibration.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "python/core_bindings/module.h"

using namespace nanobind::literals;

namespace veloxquant {

void bind_calibration(nb::module_& m) {
  const char* what = "calibration";
  m.def(
      "smooth_factors",
      [what](const CpuArray& x, const CpuArray& factors) {
        smooth_factors(view_of(x, what, "x"), writable(factors, what, "factors"));
      },
      "x"_a, "factors"_a, "x [H, N, D] -> factors fp32 [H, D], written.");
  m.def(
      "learned_rotation",
      [what](const CpuArray& x, const std::optional<CpuArray>& moments, int n_subvectors,
             int n_tables, const CpuArray& encode_matrix, const CpuArray& query_matrix,
             const std::optional<CpuArray>& token_weights) {
        const TensorView view = view_of(x, what, "x");
        require(view.ndim == 3, "[learned_rotation] x: got ", view.ndim,
                " dimensions, wanted [H, N, D]");
        const int64_t h = view.shape[0], d = view.shape[2];
        std::vector<float> rotation(h * d * d), weight(h * d);
        nb::gil_scoped_release release;
        learned_rotation(
            view, moments ? view_of(*moments, what, "moments") : TensorView(), n_subvectors,
            n_tables, MutableTensorView(rotation.data(), DType::float32, {h, d, d}),
            MutableTensorView(weight.data(), DType::float32, {h, d}),
            token_weights ? view_of(*token_weights, what, "token_weights") : TensorView());
        rotation_matrices(TensorView(rotation.data(), DType::float32, {h, d, d}),
                          TensorView(weight.data(), DType::float32, {h, d}),
                          writable(encode_matrix, what, "encode_matrix"),
                          writable(query_matrix, what, "query_matrix"));
      },
      "x"_a, "moments"_a, "n_subvectors"_a, "n_tables"_a, "encode_matrix"_a, "query_matrix"_a,
      "token_weights"_a = nb::none(),
      "x [H, N, D], moments fp32 [H, D] of the queries or None (values), token_weights fp32 [H, N] "
      "or None -> both matrices fp32 [H, D, D], written. n_tables: of a head.");
  m.def(
      "rotation_matrices",
      [what](const CpuArray& rotation, const CpuArray& weight, const CpuArray& encode_matrix,
             const CpuArray& query_matrix) {
        rotation_matrices(view_of(rotation, what, "rotation"), view_of(weight, what, "weight"),
                          writable(encode_matrix, what, "encode_matrix"),
                          writable(query_matrix, what, "query_matrix"));
      },
      "rotation"_a, "weight"_a, "encode_matrix"_a, "query_matrix"_a,
      "rotation fp32 [H, D, D], weight fp32 [H, D] -> both matrices fp32 [H, D, D], written.");
  m.def(
      "train_tables",
      [what](const CpuArray& x, const std::string& transform, const std::optional<CpuArray>& scale,
             const std::optional<CpuArray>& encode_matrix,
             const std::optional<CpuArray>& query_matrix, int n_subvectors, uint64_t seed,
             const CpuArray& tables, bool int8, const std::optional<CpuArray>& token_weights) {
        Transform t;
        t.kind = transform == "dense"      ? TransformKind::dense
                 : transform == "hadamard" ? TransformKind::hadamard
                                           : TransformKind::none;
        if (scale) t.scale = view_of(*scale, what, "scale");
        if (encode_matrix) t.encode_matrix = view_of(*encode_matrix, what, "encode_matrix");
        if (query_matrix) t.query_matrix = view_of(*query_matrix, what, "query_matrix");
        const MutableTensorView to = writable(tables, what, "tables");
        require(to.ndim == 4, "[train_tables] tables: got ", to.ndim,
                " dimensions, wanted [H, tables, C, d]");
        KMeansParams params;
        params.n_centroids = static_cast<int>(to.shape[2]);
        params.seed = seed;
        const TensorView view = view_of(x, what, "x");
        nb::gil_scoped_release release;
        const TableReport report = train_vecinfer_tables(
            view, t, n_subvectors, static_cast<int>(to.shape[1]), params, to, {},
            int8 ? TableEntries::int8 : TableEntries::fp16,
            token_weights ? view_of(*token_weights, what, "token_weights") : TensorView());
        return report.relative_error;
      },
      "x"_a, "transform"_a, "scale"_a, "encode_matrix"_a, "query_matrix"_a, "n_subvectors"_a,
      "seed"_a, "tables"_a, "int8"_a, "token_weights"_a = nb::none(),
      "x [H, N, D] -> tables fp16 [H, n, C, d], written: sub-vector m uses table m % n; returns "
      "the "
      "relative error of each head. int8: entries are int8 times a power of two, as CUDA wants "
      "4-dimensional ones. token_weights: fp32 [H, N], or None.");
  nb::dict lanes;  // tables of a head that CUDA looks up by lane
  lanes["keys"] = cuda::lane_tables(Side::keys);
  lanes["values"] = cuda::lane_tables(Side::values);
  m.attr("LANE_TABLES") = lanes;
}

}  // namespace veloxquant
