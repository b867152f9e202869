// Training product tables of RoPE pairs: RoPE undone, weighted, dealt out, then VecInfer's k-means.
#include "veloxquant/vecinfer_rope.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "src/calibration/float_rows.h"
#include "src/calibration/sampling.h"
#include "src/math/portable.h"

namespace veloxquant {
namespace {

// Keys of one head before RoPE, [N][D]. Tokens that are not finite stay so: training leaves them
// out.
std::vector<float> unrotated(const TensorView& x, int64_t head,
                             const std::vector<int64_t>& positions, const Rope& rope) {
  const int64_t n = x.shape[1], dims = x.shape[2];
  std::vector<float> rows(n * dims);
  for (int64_t t = 0; t < n; ++t) read_row(x, head, t, rows.data() + t * dims);
  rope.turn_rows(default_backend(), RopeDirection::inverse, positions.data(), n, rows.data(), dims);
  return rows;
}

// Log of the determinant of each pair's covariance, weighted: the volume that its codes must cover.
// The mean is not part of it: the centroids carry it.
std::vector<double> log_volumes(const std::vector<float>& rows, const std::vector<int64_t>& tokens,
                                const Rope& rope, const float* weight) {
  constexpr double kFloor =
      1e-12;  // relative to the product of the moments: a pair that never moves
  const int64_t dims = rope.spec().head_dim;
  const double n = static_cast<double>(std::max<size_t>(1, tokens.size()));
  std::vector<double> volumes;
  for (size_t j = 0; j < rope.pairs().size(); ++j) {
    double a = 0, b = 0, aa = 0, bb = 0, ab = 0;
    for (int64_t t : tokens) {
      const double first = rows[t * dims + rope.pairs()[j].first];
      const double second = rows[t * dims + rope.pairs()[j].second];
      a += first;
      b += second;
      aa += first * first;
      bb += second * second;
      ab += first * second;
    }
    const double moment = std::max((aa + bb) / n, 1e-30);
    const double caa = aa / n - a / n * (a / n), cbb = bb / n - b / n * (b / n);
    const double cab = ab / n - a / n * (b / n);
    const double determinant = std::max(caa * cbb - cab * cab, kFloor * moment * moment);
    volumes.push_back(std::log(determinant) + 4.0 * std::log(static_cast<double>(weight[j])));
  }
  return volumes;
}

// Descending, each pair goes to the sub-vector with room whose volumes add up to least: the
// allocation of the learned rotation, pair by pair.
std::vector<int32_t> balanced_order(const std::vector<double>& volumes, int n_subvectors) {
  const int pairs = static_cast<int>(volumes.size()), room = pairs / n_subvectors;
  const double least = *std::min_element(volumes.begin(), volumes.end());
  std::vector<int32_t> by_volume(pairs), order(pairs);
  std::iota(by_volume.begin(), by_volume.end(), 0);
  std::stable_sort(by_volume.begin(), by_volume.end(),
                   [&](int32_t a, int32_t b) { return volumes[a] > volumes[b]; });
  std::vector<int> filled(n_subvectors, 0);
  std::vector<double> load(n_subvectors, 0.0);
  for (int32_t j : by_volume) {
    int best = -1;
    for (int m = 0; m < n_subvectors; ++m) {
      if (filled[m] < room && (best < 0 || load[m] < load[best])) best = m;
    }
    order[best * room + filled[best]++] = j;
    load[best] += volumes[j] - least;
  }
  return order;
}

}  // namespace

TableReport train_vecinfer_rope(const TensorView& x, const std::vector<int64_t>& positions,
                                const Rope& rope, const TensorView& weight, int n_subvectors,
                                const KMeansParams& params, const MutableTensorView& order,
                                const MutableTensorView& tables,
                                const std::function<void(double)>& progress) {
  require_float_rows(x, "train_vecinfer_rope");
  const int64_t heads = x.shape[0], n = x.shape[1], dims = x.shape[2], pairs = dims / 2;
  require(dims == rope.spec().head_dim, "[train_vecinfer_rope] x: got head_dim ", dims, ", wanted ",
          rope.spec().head_dim, " of the RoPE");
  require(static_cast<int64_t>(positions.size()) == n, "[train_vecinfer_rope] positions: got ",
          positions.size(), ", wanted one per token: ", n);
  require(n_subvectors >= 1 && pairs % n_subvectors == 0,
          "[train_vecinfer_rope] n_subvectors: got ", n_subvectors, ", wanted a divisor of the ",
          pairs, " pairs");
  require(!weight.empty() && weight.dtype == DType::float32 && weight.ndim == 2 &&
              weight.shape[0] == heads && weight.shape[1] == pairs,
          "[train_vecinfer_rope] weight: got ", dtype_name(weight.dtype), " with ", weight.ndim,
          " dimensions, wanted float32 [", heads, ", ", pairs, "]");
  require(!order.empty() && order.dtype == DType::int32 && order.ndim == 2 &&
              order.shape[0] == heads && order.shape[1] == pairs,
          "[train_vecinfer_rope] order: got ", dtype_name(order.dtype), " with ", order.ndim,
          " dimensions, wanted int32 [", heads, ", ", pairs, "]");

  std::vector<float> slotted(heads * n * dims);
  parallel_for(heads, [&](long h) {
    const float* w = static_cast<const float*>(weight.at(h));
    const std::vector<float> rows = unrotated(x, h, positions, rope);
    const std::vector<int32_t> here =
        balanced_order(log_volumes(rows, finite_tokens(x, h), rope, w), n_subvectors);
    std::copy(here.begin(), here.end(), static_cast<int32_t*>(order.at(h)));
    for (int64_t t = 0; t < n; ++t) {
      const float* row = rows.data() + t * dims;
      float* out = slotted.data() + (h * n + t) * dims;
      for (int64_t k = 0; k < pairs; ++k) {
        const RopePair pair = rope.pairs()[here[k]];
        out[2 * k] = mul(row[pair.first], w[here[k]]);
        out[2 * k + 1] = mul(row[pair.second], w[here[k]]);
      }
    }
  });
  return train_vecinfer_tables(TensorView(slotted.data(), DType::float32, {heads, n, dims}), {},
                               n_subvectors, n_subvectors, params, tables, progress);
}

}  // namespace veloxquant
