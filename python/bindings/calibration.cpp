#include <mlx/array.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "python/bindings/module.h"
#include "src/mlx/views.h"
#include "veloxquant/calibration.h"
#include "veloxquant/cuda.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace veloxquant {
namespace mx = mlx::core;
namespace {

mx::array allocate(mx::Shape shape, mx::Dtype dtype) {
  mx::array a = mx::zeros(shape, dtype, mx::Device::cpu);
  mx::eval(a);
  return a;
}

mx::array smooth(mx::array x, float floor) {
  mx::eval(x);
  require(x.ndim() == 3, "[smooth_factors] x: got ", x.ndim(), " dimensions, wanted [H, N, D]");
  mx::array lambda = allocate({x.shape(0), x.shape(2)}, mx::float32);
  smooth_factors(view_of(x), mutable_view_of(lambda), floor);
  return lambda;
}

// Evaluated, fp32 and row-major, so that a view of it can be taken.
mx::array float_rows(const mx::array& a) {
  mx::array rows =
      mx::contiguous(mx::astype(a, mx::float32, mx::Device::cpu), false, mx::Device::cpu);
  mx::eval(rows);
  return rows;
}

std::pair<mx::array, mx::array> rotation(mx::array x, std::optional<mx::array> query_moments,
                                         int n_subvectors, int n_tables,
                                         std::optional<mx::array> token_weights) {
  mx::eval(x);
  require(x.ndim() == 3, "[learned_rotation] x: got ", x.ndim(), " dimensions, wanted [H, N, D]");
  mx::array rotation = allocate({x.shape(0), x.shape(2), x.shape(2)}, mx::float32);
  mx::array weight = allocate({x.shape(0), x.shape(2)}, mx::float32);
  if (query_moments) query_moments = float_rows(*query_moments);
  if (token_weights) token_weights = float_rows(*token_weights);
  learned_rotation(view_of(x), query_moments ? view_of(*query_moments) : TensorView(), n_subvectors,
                   n_tables, mutable_view_of(rotation), mutable_view_of(weight),
                   token_weights ? view_of(*token_weights) : TensorView());
  return {rotation, weight};
}

std::pair<mx::array, mx::array> matrices(const mx::array& rotation, const mx::array& weight) {
  const mx::array u = float_rows(rotation), w = float_rows(weight);
  mx::array encode_matrix = allocate(u.shape(), mx::float32);
  mx::array query_matrix = allocate(u.shape(), mx::float32);
  rotation_matrices(view_of(u), view_of(w), mutable_view_of(encode_matrix),
                    mutable_view_of(query_matrix));
  return {encode_matrix, query_matrix};
}

std::pair<mx::array, std::vector<double>> tables(
    mx::array x, bool hadamard, std::optional<mx::array> scale,
    std::optional<mx::array> encode_matrix, std::optional<mx::array> query_matrix, int n_subvectors,
    int n_centroids, int n_tables, int max_iterations, uint64_t seed, const std::string& start,
    const std::string& entries, std::optional<mx::array> token_weights) {
  mx::eval(x);
  require(x.ndim() == 3, "[train_tables] x: got ", x.ndim(), " dimensions, wanted [H, N, D]");
  require(n_subvectors >= 1 && x.shape(2) % n_subvectors == 0, "[train_tables] num_subspaces: got ",
          n_subvectors, ", wanted a divisor of head_dim = ", x.shape(2));
  Transform transform;
  require(encode_matrix.has_value() == query_matrix.has_value() && !(scale && encode_matrix),
          "[train_tables] transform: got one matrix, or matrices and a scale, wanted encode_matrix "
          "and query_matrix, a scale, or neither");
  transform.kind = encode_matrix       ? TransformKind::dense
                   : hadamard || scale ? TransformKind::hadamard
                                       : TransformKind::none;
  if (scale) {
    scale = float_rows(*scale);
    transform.scale = view_of(*scale);
  }
  if (encode_matrix) {
    encode_matrix = float_rows(*encode_matrix);
    query_matrix = float_rows(*query_matrix);
    transform.encode_matrix = view_of(*encode_matrix);
    transform.query_matrix = view_of(*query_matrix);
  }
  KMeansParams params;
  params.n_centroids = n_centroids;
  params.max_iterations = max_iterations;
  params.seed = seed;
  require(start == "plus_plus" || start == "normal", "[train_tables] start: got '", start,
          "', wanted plus_plus or normal");
  params.start = start == "normal" ? KMeansStart::normal : KMeansStart::plus_plus;
  require(entries == "fp16" || entries == "int8", "[train_tables] entries: got '", entries,
          "', wanted fp16 or int8");
  if (token_weights) token_weights = float_rows(*token_weights);
  mx::array out =
      allocate({x.shape(0), n_tables, n_centroids, x.shape(2) / n_subvectors}, mx::float16);
  const TableReport report = train_vecinfer_tables(
      view_of(x), transform, n_subvectors, n_tables, params, mutable_view_of(out), {},
      entries == "int8" ? TableEntries::int8 : TableEntries::fp16,
      token_weights ? view_of(*token_weights) : TensorView());
  return {out, report.relative_error};
}

}  // namespace

void bind_calibration(nb::module_& m) {
  m.def("smooth_factors", &smooth, "x"_a, "floor"_a = 1e-4f, WithoutGil(),
        "x: floats [H, N, D] -> lambda fp32 [H, D] = sqrt(max_t |x|) (arXiv 2510.06175, eq. 4).");
  m.def("learned_rotation", &rotation, "x"_a, "query_moments"_a = nb::none(), nb::kw_only(),
        "n_subvectors"_a, "n_tables"_a, "token_weights"_a = nb::none(), WithoutGil(),
        "x: floats [H, N, D], query_moments: E q_i^2, [H, D] (none for values), token_weights "
        "[H, N] -> (rotation fp32 [H, D, D], weight fp32 [H, D]). See calibration.h.");
  nb::dict lanes;  // tables of a head that CUDA looks up by lane
  lanes["keys"] = cuda::lane_tables(Side::keys);
  lanes["values"] = cuda::lane_tables(Side::values);
  m.attr("LANE_TABLES") = lanes;
  m.def("rotation_matrices", &matrices, "rotation"_a, "weight"_a, WithoutGil(),
        "rotation [H, D, D], weight [H, D] -> (encode_matrix, query_matrix), fp32 [H, D, D].");
  m.def(
      "train_tables", &tables, "x"_a, nb::kw_only(), "hadamard"_a = true, "scale"_a = nb::none(),
      "encode_matrix"_a = nb::none(), "query_matrix"_a = nb::none(), "n_subvectors"_a,
      "n_centroids"_a, "n_tables"_a, "max_iterations"_a = 30, "seed"_a = 0, "start"_a = "plus_plus",
      "entries"_a = "fp16", "token_weights"_a = nb::none(), WithoutGil(),
      "x: floats [H, N, D] -> (tables fp16 [H, n_tables, C, d], relative squared error per head). "
      "Sub-vector m uses table m % n_tables.");
}

}  // namespace veloxquant
