#include <algorithm>
#include <cmath>
#include <vector>

#include "src/calibration/float_rows.h"
#include "veloxquant/backend.h"
#include "veloxquant/calibration.h"

namespace veloxquant {

void smooth_factors(const TensorView& x, const MutableTensorView& lambda, float floor) {
  require_float_rows(x, "smooth_factors");
  require(!lambda.empty() && lambda.dtype == DType::float32 && lambda.ndim == 2 &&
              lambda.shape[0] == x.shape[0] && lambda.shape[1] == x.shape[2],
          "[smooth_factors] lambda: got ", dtype_name(lambda.dtype), " with ", lambda.ndim,
          " dimensions, wanted float32 [", x.shape[0], ", ", x.shape[2], "]");
  require(floor >= 0.0f && floor <= 1.0f, "[smooth_factors] floor: got ", floor, ", wanted 0..1");

  // Keeps 1 / lambda finite for a head that is all zeros.
  constexpr float kSmallest = 1e-8f;
  const int64_t tokens = x.shape[1], dims = x.shape[2];
  parallel_for(x.shape[0], [&](long h) {
    std::vector<float> row(dims), largest(dims, 0.0f);
    for (int64_t t = 0; t < tokens; ++t) {
      read_row(x, h, t, row.data());
      for (int64_t i = 0; i < dims; ++i) {
        const float magnitude = std::fabs(row[i]);
        if (std::isfinite(magnitude)) largest[i] = std::max(largest[i], magnitude);
      }
    }
    const float least =
        std::max(kSmallest, floor * *std::max_element(largest.begin(), largest.end()));
    for (int64_t i = 0; i < dims; ++i) {
      *static_cast<float*>(lambda.at(h, i)) = std::sqrt(std::max(largest[i], least));
    }
  });
}

}  // namespace veloxquant
