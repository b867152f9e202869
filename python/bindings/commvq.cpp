#include <mlx/array.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>
#include <mlx/utils.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "python/bindings/module.h"
#include "src/mlx/commvq_ops.h"
#include "src/mlx/function_op.h"
#include "src/mlx/views.h"
#include "veloxquant/commvq.h"
#include "veloxquant/vecinfer_rope.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace veloxquant {
namespace mx = mlx::core;
namespace {

mx::array evaluated(const mx::array& a, mx::Dtype dtype) {
  mx::array rows = dense(a, dtype);
  mx::eval(rows);
  return rows;
}

mx::array allocate(mx::Shape shape, mx::Dtype dtype) {
  mx::array a = mx::zeros(std::move(shape), dtype, mx::Device::cpu);
  mx::eval(a);
  return a;
}

std::vector<int64_t> positions_of(const mx::array& positions, int64_t n) {
  const mx::array p = evaluated(positions, mx::int32);
  require(p.ndim() == 1 && p.shape(0) == n, "[rope] positions: got ", shape_text(p),
          ", wanted one per token: ", n);
  return {p.data<int32_t>(), p.data<int32_t>() + n};
}

mx::array turn(const Rope& rope, const mx::array& x, const mx::array& positions, bool inverse) {
  require(x.ndim() >= 2 && x.shape(-1) == rope.spec().head_dim, "[rope] x: got ", shape_text(x),
          ", wanted [..., n, ", rope.spec().head_dim, "]");
  const mx::array rows = evaluated(x, mx::float32);
  const int64_t n = x.shape(-2), dims = x.shape(-1);
  const std::vector<int64_t> at = positions_of(positions, n);
  mx::array out = allocate(x.shape(), mx::float32);
  std::copy_n(rows.data<float>(), rows.size(), out.data<float>());
  nb::gil_scoped_release release;
  for (int64_t i = 0; n > 0 && i < static_cast<int64_t>(out.size()) / (n * dims); ++i) {
    rope.turn_rows(default_backend(), inverse ? RopeDirection::inverse : RopeDirection::forward,
                   at.data(), n, out.data<float>() + i * n * dims, dims);
  }
  return out;
}

std::pair<mx::array, std::vector<std::vector<double>>> train(
    mx::array x, const mx::array& positions, const Rope& rope, std::optional<mx::array> weight,
    int n_stages, int n_entries, int max_steps, uint64_t seed,
    const std::function<void(double)>& progress) {
  mx::eval(x);
  require(x.ndim() == 3, "[train_commvq] x: got ", x.ndim(), " dimensions, wanted [H, N, D]");
  require(n_stages >= 1 && n_entries >= 2, "[train_commvq] got ", n_stages, " stages of ",
          n_entries, " entries, wanted at least 1 of 2");
  const std::vector<int64_t> at = positions_of(positions, x.shape(1));
  if (weight) weight = evaluated(*weight, mx::float32);
  mx::array book = allocate({x.shape(0), n_stages, n_entries, 2, x.shape(2) / 2}, mx::float16);
  CommVQParams params;
  params.max_steps = max_steps;
  params.seed = seed;
  CommVQReport report;
  {
    nb::gil_scoped_release release;
    std::function<void(double)> locked;
    if (progress) {
      locked = [&](double fraction) {
        nb::gil_scoped_acquire acquire;
        progress(fraction);
      };
    }
    report = train_commvq(view_of(x), at, rope, weight ? view_of(*weight) : TensorView(), params,
                          mutable_view_of(book), locked);
  }
  return {book, report.relative_error};
}

std::tuple<mx::array, mx::array, std::vector<double>> train_pairs(
    mx::array x, const mx::array& positions, const Rope& rope, const mx::array& weight,
    int n_subvectors, int n_centroids, uint64_t seed) {
  mx::eval(x);
  require(x.ndim() == 3, "[train_vecinfer_rope] x: got ", x.ndim(),
          " dimensions, wanted [H, N, D]");
  require(n_subvectors >= 1 && x.shape(2) % (2 * n_subvectors) == 0,
          "[train_vecinfer_rope] n_subvectors: got ", n_subvectors, ", wanted a divisor of the ",
          x.shape(2) / 2, " pairs");
  const std::vector<int64_t> at = positions_of(positions, x.shape(1));
  const mx::array weights = evaluated(weight, mx::float32);
  mx::array order = allocate({x.shape(0), x.shape(2) / 2}, mx::int32);
  mx::array tables =
      allocate({x.shape(0), n_subvectors, n_centroids, x.shape(2) / n_subvectors}, mx::float16);
  KMeansParams params;
  params.n_centroids = n_centroids;
  params.seed = seed;
  TableReport report;
  {
    nb::gil_scoped_release release;
    report = train_vecinfer_rope(view_of(x), at, rope, view_of(weights), n_subvectors, params,
                                 mutable_view_of(order), mutable_view_of(tables));
  }
  return {tables, order, report.relative_error};
}

mx::array weight_of(const mx::array& query_moments, const Rope& rope) {
  const mx::array moments = evaluated(query_moments, mx::float32);
  require(moments.ndim() == 2, "[commvq_weight] query_moments: got ", shape_text(moments),
          ", wanted [H, D]");
  mx::array weight =
      allocate({moments.shape(0), static_cast<int>(rope.pairs().size())}, mx::float32);
  commvq_weight(view_of(moments), rope, mutable_view_of(weight));
  return weight;
}

}  // namespace

void bind_commvq(nb::module_& m) {
  nb::class_<Rope>(m, "Rope", "The rotary embedding of a layer: include/veloxquant/rope.h.")
      .def(
          "__init__",
          [](Rope* self, int head_dim, const mx::array& inv_freq, bool traditional,
             double position_scale, double attention_factor) {
            const mx::array frequencies = evaluated(inv_freq, mx::float32);
            RopeSpec spec;
            spec.head_dim = head_dim;
            spec.inv_freq.assign(frequencies.data<float>(),
                                 frequencies.data<float>() + frequencies.size());
            spec.traditional = traditional;
            spec.position_scale = static_cast<float>(position_scale);
            spec.attention_factor = static_cast<float>(attention_factor);
            new (self) Rope(std::move(spec));
          },
          "head_dim"_a, "inv_freq"_a, "traditional"_a = false, "position_scale"_a = 1.0,
          "attention_factor"_a = 1.0)
      .def(
          "rotate",
          [](const Rope& self, const mx::array& x, const mx::array& positions) {
            return turn(self, x, positions, false);
          },
          "x"_a, "positions"_a, "x: floats [..., n, D], positions: integers [n] -> fp32.")
      .def(
          "unrotate",
          [](const Rope& self, const mx::array& x, const mx::array& positions) {
            return turn(self, x, positions, true);
          },
          "x"_a, "positions"_a);
  m.def("commvq_stages", &commvq_stages, "head_dim"_a, "bits"_a,
        "Stages that fit `bits` per element, the scalar of each token included.");
  m.def("commvq_weight", &weight_of, "query_moments"_a, "rope"_a,
        "E q_i^2 [H, D] -> the metric of the pairs, fp32 [H, D / 2].");
  m.def("train_commvq", &train, "x"_a, "positions"_a, "rope"_a, "weight"_a = nb::none(),
        nb::kw_only(), "n_stages"_a, "n_entries"_a = 64, "max_steps"_a = 30, "seed"_a = 0,
        "progress"_a = nb::none(),
        "x: keys [H, N, D], RoPE applied -> (codebook fp16 [H, n_stages, n_entries, 2, D / 2], "
        "relative squared error per head after every stage).");
  m.def("train_vecinfer_rope", &train_pairs, "x"_a, "positions"_a, "rope"_a, "weight"_a,
        nb::kw_only(), "n_subvectors"_a, "n_centroids"_a, "seed"_a = 0,
        "x: keys [H, N, D], RoPE applied -> (tables fp16 [H, n_subvectors, C, d], order int32 "
        "[H, D / 2], relative squared error per head).");
  m.def(
      "comm_vq_decode",
      [](const mx::array& indices, const mx::array& codebook, const mx::array& positions,
         const mx::array& inv_freq, int n_cb, int sub_dim, int cb_size, mx::StreamOrDevice s) {
        return comm_vq_decode_op(indices, codebook, positions, inv_freq, n_cb, sub_dim, cb_size, s);
      },
      "indices"_a, "codebook"_a, "positions"_a, "inv_freq"_a, "n_cb"_a, "sub_dim"_a, "cb_size"_a,
      "stream"_a = nb::none());
}

}  // namespace veloxquant
