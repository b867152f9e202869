#include <mlx/array.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "python/bindings/module.h"
#include "src/mlx/views.h"
#include "veloxquant/calibration.h"

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
  nb::gil_scoped_release release;
  smooth_factors(view_of(x), mutable_view_of(lambda), floor);
  return lambda;
}

std::pair<mx::array, std::vector<double>> tables(mx::array x, bool hadamard,
                                                 std::optional<mx::array> scale, int n_subvectors,
                                                 int n_centroids, bool per_head, int max_iterations,
                                                 uint64_t seed) {
  mx::eval(x);
  require(x.ndim() == 3, "[train_tables] x: got ", x.ndim(), " dimensions, wanted [H, N, D]");
  require(n_subvectors >= 1 && x.shape(2) % n_subvectors == 0, "[train_tables] num_subspaces: got ",
          n_subvectors, ", wanted a divisor of head_dim = ", x.shape(2));
  Transform transform;
  transform.kind = hadamard || scale ? TransformKind::hadamard : TransformKind::none;
  if (scale) {
    scale =
        mx::contiguous(mx::astype(*scale, mx::float32, mx::Device::cpu), false, mx::Device::cpu);
    mx::eval(*scale);
    transform.scale = view_of(*scale);
  }
  KMeansParams params;
  params.n_centroids = n_centroids;
  params.max_iterations = max_iterations;
  params.seed = seed;
  mx::array out =
      allocate({x.shape(0), per_head ? 1 : n_subvectors, n_centroids, x.shape(2) / n_subvectors},
               mx::float16);
  TableReport report;
  {
    nb::gil_scoped_release release;
    report = train_vecinfer_tables(view_of(x), transform, n_subvectors, per_head, params,
                                   mutable_view_of(out));
  }
  return {out, report.relative_error};
}

}  // namespace

void bind_calibration(nb::module_& m) {
  m.def("smooth_factors", &smooth, "x"_a, "floor"_a = 1e-4f,
        "x: floats [H, N, D] -> lambda fp32 [H, D] = sqrt(max_t |x|) (arXiv 2510.06175, eq. 4).");
  m.def("train_tables", &tables, "x"_a, nb::kw_only(), "hadamard"_a = true, "scale"_a = nb::none(),
        "n_subvectors"_a, "n_centroids"_a, "per_head"_a = false, "max_iterations"_a = 30,
        "seed"_a = 0,
        "x: floats [H, N, D] -> (tables fp16 [H, n_subvectors or 1, C, d], relative squared error "
        "per head).");
}

}  // namespace veloxquant
