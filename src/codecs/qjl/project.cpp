// Dense sketches: the product of a matrix and a tile, with Highway and as a plain loop.
#include "src/codecs/qjl/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/qjl/project.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace veloxquant::qjl::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::CappedTag<float, kBlockTokens>;
using VF = hn::Vec<F32>;

// kRows rows of the result for two vectors of tokens: every sum is one chain, in order.
template <int kRows>
HWY_INLINE void project_rows(const float* HWY_RESTRICT matrix, int n_columns,
                             const float* HWY_RESTRICT x_t, float* HWY_RESTRICT y_t) {
  const F32 df;
  const int lanes = static_cast<int>(hn::Lanes(df));
  for (int t = 0; t < kBlockTokens; t += 2 * lanes) {
    VF low[kRows], high[kRows];
    for (int r = 0; r < kRows; ++r) {
      const VF entry = hn::Set(df, matrix[r * n_columns]);
      low[r] = hn::Mul(entry, hn::LoadU(df, x_t + t));
      high[r] = hn::Mul(entry, hn::LoadU(df, x_t + t + lanes));
    }
    for (int i = 1; i < n_columns; ++i) {
      const VF a = hn::LoadU(df, x_t + i * kBlockTokens + t);
      const VF b = hn::LoadU(df, x_t + i * kBlockTokens + t + lanes);
      for (int r = 0; r < kRows; ++r) {
        const VF entry = hn::Set(df, matrix[r * n_columns + i]);
        low[r] = hn::Add(low[r], hn::Mul(entry, a));
        high[r] = hn::Add(high[r], hn::Mul(entry, b));
      }
    }
    for (int r = 0; r < kRows; ++r) {
      hn::StoreU(low[r], df, y_t + r * kBlockTokens + t);
      hn::StoreU(high[r], df, y_t + r * kBlockTokens + t + lanes);
    }
  }
}

void project(const float* matrix, int n_rows, int n_columns, const float* x_t, float* y_t) {
  int r = 0;
  for (; r + 4 <= n_rows; r += 4) {
    project_rows<4>(matrix + r * n_columns, n_columns, x_t, y_t + r * kBlockTokens);
  }
  for (; r < n_rows; ++r) {
    project_rows<1>(matrix + r * n_columns, n_columns, x_t, y_t + r * kBlockTokens);
  }
}

}  // namespace veloxquant::qjl::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "src/backends/cpu/simd_targets.h"

namespace veloxquant::qjl {

HWY_EXPORT(project);

ProjectTile cpu_project() {
  cpu::apply_environment();
  return [](const float* matrix, int n_rows, int n_columns, const float* x_t, float* y_t) {
    HWY_DYNAMIC_DISPATCH(project)(matrix, n_rows, n_columns, x_t, y_t);
  };
}

ProjectTile reference_project() {
  return [](const float* matrix, int n_rows, int n_columns, const float* x_t, float* y_t) {
    for (int r = 0; r < n_rows; ++r) {
      for (int t = 0; t < kBlockTokens; ++t) {
        float sum = 0.0f;
        for (int i = 0; i < n_columns; ++i) {
          const float product = mul(matrix[r * n_columns + i], x_t[i * kBlockTokens + t]);
          sum = i == 0 ? product : sum + product;
        }
        y_t[r * kBlockTokens + t] = sum;
      }
    }
  };
}

}  // namespace veloxquant::qjl
#endif  // HWY_ONCE
