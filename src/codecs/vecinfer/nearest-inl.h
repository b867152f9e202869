// Nearest centroids of many vectors, for every SIMD level. Included by cpu.cpp only.
//
// The codes are those of the direct distance (src/math/centroids.h), found at a third of its cost:
//   filter   s_c = x.c - |c|^2/2, one fused multiply-add a dimension, the best block of centroids
//            and the runner-up kept per token. |x-c|^2 = |x|^2 - 2 s_c, so the nearest has the
//            largest s.
//   check    the direct distances of the best block alone, in the reference's order of operations.
// A token whose runner-up comes within `margin` of the best, the rounding error of both forms, has
// all its blocks checked; tokens and tables that the error bound does not cover take direct
// distances.
#if defined(VELOXQUANT_VECINFER_NEAREST_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef VELOXQUANT_VECINFER_NEAREST_INL_H_
#undef VELOXQUANT_VECINFER_NEAREST_INL_H_
#else
#define VELOXQUANT_VECINFER_NEAREST_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstring>

#include "src/codecs/vecinfer/format.h"
#include "src/math/centroids.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant::vecinfer::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::ScalableTag<float>;
using I32 = hn::ScalableTag<int32_t>;

// Nearest centroids of kGroup vectors of tokens at once: the centroid broadcasts are shared.
// kSubDim = 0 reads the tokens from memory instead of registers (wide sub-vectors).
template <int kSubDim, int kGroup>
HWY_INLINE void nearest_group(const float* HWY_RESTRICT x, int64_t x_stride,
                              const float* HWY_RESTRICT table, int n_centroids, int sub_dim,
                              uint16_t* HWY_RESTRICT codes, float* HWY_RESTRICT distance) {
  const F32 df;
  const I32 di;
  const int lanes = static_cast<int>(hn::Lanes(df));
  using VF = hn::Vec<F32>;
  using VI = hn::Vec<I32>;
  constexpr int kHeld = kSubDim == 0 ? 1 : kSubDim;
  VF held[kHeld][kGroup];
  if (kSubDim != 0) {
    for (int i = 0; i < kHeld; ++i) {
      for (int g = 0; g < kGroup; ++g) held[i][g] = hn::LoadU(df, x + i * x_stride + g * lanes);
    }
  }
  VF best[kGroup];
  VI index[kGroup];
  for (int g = 0; g < kGroup; ++g) {
    best[g] = hn::Set(df, float_of(0x7f800000u));
    index[g] = hn::Zero(di);
  }
  const int dims = kSubDim == 0 ? sub_dim : kSubDim;
  for (int c = 0; c < n_centroids; ++c, table += dims) {
    VF sum[kGroup];
    for (int g = 0; g < kGroup; ++g) {
      const VF value = kSubDim == 0 ? hn::LoadU(df, x + g * lanes) : held[0][g];
      const VF difference = hn::Sub(value, hn::Set(df, table[0]));
      sum[g] = hn::Mul(difference, difference);
    }
    for (int i = 1; i < dims; ++i) {
      const VF centroid = hn::Set(df, table[i]);
      for (int g = 0; g < kGroup; ++g) {
        const VF value =
            kSubDim == 0 ? hn::LoadU(df, x + i * x_stride + g * lanes) : held[i % kHeld][g];
        const VF difference = hn::Sub(value, centroid);
        sum[g] = hn::Add(sum[g], hn::Mul(difference, difference));
      }
    }
    const VI code = hn::Set(di, c);
    for (int g = 0; g < kGroup; ++g) {
      const auto closer = hn::Lt(sum[g], best[g]);
      best[g] = hn::IfThenElse(closer, sum[g], best[g]);
      index[g] = hn::IfThenElse(hn::RebindMask(di, closer), code, index[g]);
    }
  }
  const hn::Rebind<uint16_t, I32> du16;
  for (int g = 0; g < kGroup; ++g) {
    hn::StoreU(hn::DemoteTo(du16, index[g]), du16, codes + g * lanes);
    if (distance != nullptr) hn::StoreU(best[g], df, distance + g * lanes);
  }
}

// Larger tables are searched in runs of this many centroids, which stay in the cache.
constexpr int kRunCentroids = 256;

// A table as the filter reads it. Blocks of Lanes(F32) centroids, the last one padded with
// centroids that are never nearest.
template <int kMaxDims>
struct FilterTable {
  static constexpr int kCentroids = kRunCentroids + HWY_MAX_BYTES / sizeof(float);
  const float* rows;  // [C][d], the given table or padded_rows
  HWY_ALIGN float padded_rows[kCentroids * kMaxDims];
  HWY_ALIGN float columns[kCentroids * kMaxDims];  // [block][d][lane]
  HWY_ALIGN float bias[kCentroids];                // -|c|^2 / 2
  int n_blocks;
  float largest;  // max |c|^2; infinite or NaN where the filter cannot be used
};

// Lanes(F32) rows of d values -> d columns.
template <int kSubDim>
HWY_INLINE void columns_of(const float* HWY_RESTRICT row, int dims, float* HWY_RESTRICT column) {
  const F32 df;
  const int lanes = static_cast<int>(hn::Lanes(df));
  hn::Vec<F32> a, b, c, d;
  if (kSubDim == 2) {
    hn::LoadInterleaved2(df, row, a, b);
    hn::StoreU(a, df, column);
    hn::StoreU(b, df, column + lanes);
  } else if (kSubDim == 4) {
    hn::LoadInterleaved4(df, row, a, b, c, d);
    hn::StoreU(a, df, column);
    hn::StoreU(b, df, column + lanes);
    hn::StoreU(c, df, column + 2 * lanes);
    hn::StoreU(d, df, column + 3 * lanes);
  } else {
    for (int k = 0; k < lanes; ++k) {
      for (int i = 0; i < dims; ++i) column[i * lanes + k] = row[k * dims + i];
    }
  }
}

template <int kSubDim, int kMaxDims>
HWY_INLINE void prepare(const float* HWY_RESTRICT table, int n_centroids, int sub_dim,
                        FilterTable<kMaxDims>& out) {
  const F32 df;
  const int lanes = static_cast<int>(hn::Lanes(df));
  const int dims = kSubDim == 0 ? sub_dim : kSubDim;
  out.n_blocks = (n_centroids + lanes - 1) / lanes;
  const int padded = out.n_blocks * lanes;
  out.rows = table;
  if (padded != n_centroids) {
    std::copy(table, table + n_centroids * dims, out.padded_rows);
    std::fill(out.padded_rows + n_centroids * dims, out.padded_rows + padded * dims, 0.0f);
    out.rows = out.padded_rows;
  }
  for (int b = 0; b < out.n_blocks; ++b) {
    columns_of<kSubDim>(out.rows + b * dims * lanes, dims, out.columns + b * dims * lanes);
  }
  auto largest = hn::Zero(df);
  auto finite = hn::Zero(df);  // turns NaN where a norm is infinite or NaN
  for (int b = 0; b < out.n_blocks; ++b) {
    auto norm = hn::Zero(df);
    for (int i = 0; i < dims; ++i) {
      const auto c = hn::LoadU(df, out.columns + (b * dims + i) * lanes);
      norm = hn::MulAdd(c, c, norm);
    }
    largest = hn::Max(largest, norm);
    finite = hn::MulAdd(norm, hn::Zero(df), finite);
    hn::StoreU(hn::Mul(norm, hn::Set(df, -0.5f)), df, out.bias + b * lanes);
  }
  out.largest = hn::GetLane(hn::MaxOfLanes(df, largest)) + hn::GetLane(hn::SumOfLanes(df, finite));
  for (int c = n_centroids; c < padded; ++c) {
    out.bias[c] = -float_of(0x7f800000u);
    const int b = c / lanes, k = c % lanes;
    for (int i = 0; i < dims; ++i) out.columns[(b * dims + i) * lanes + k] = float_of(0x7f800000u);
  }
}

// The nearest of the centroids of one block to one finite token, by direct distance.
template <int kSubDim, int kMaxDims>
HWY_INLINE void check_block(const float* HWY_RESTRICT x, int64_t x_stride, int sub_dim, int block,
                            const FilterTable<kMaxDims>& table, float& distance, int& code) {
  const F32 df;
  const int lanes = static_cast<int>(hn::Lanes(df));
  const int dims = kSubDim == 0 ? sub_dim : kSubDim;
  const float* HWY_RESTRICT column = table.columns + block * dims * lanes;
  auto difference = hn::Sub(hn::Set(df, x[0]), hn::LoadU(df, column));
  auto sum = hn::Mul(difference, difference);
  for (int i = 1; i < dims; ++i) {
    difference = hn::Sub(hn::Set(df, x[i * x_stride]), hn::LoadU(df, column + i * lanes));
    sum = hn::Add(sum, hn::Mul(difference, difference));
  }
  const auto least = hn::MinOfLanes(df, sum);
  const float found = hn::GetLane(least);
  if (found < distance) {
    distance = found;
    code = block * lanes + static_cast<int>(hn::FindFirstTrue(df, hn::Eq(sum, least)));
  }
}

// As nearest_group, with the filter.
template <int kSubDim, int kGroup, int kMaxDims>
HWY_INLINE void filter_group(const float* HWY_RESTRICT x, int64_t x_stride,
                             const FilterTable<kMaxDims>& table, int n_centroids, int sub_dim,
                             uint16_t* HWY_RESTRICT codes, float* HWY_RESTRICT distance) {
  const F32 df;
  const I32 di;
  const int lanes = static_cast<int>(hn::Lanes(df));
  const int dims = kSubDim == 0 ? sub_dim : kSubDim;
  using VF = hn::Vec<F32>;
  using VI = hn::Vec<I32>;
  constexpr bool kHold = kSubDim != 0 && kSubDim <= 8;  // tokens stay in registers
  constexpr int kHeld = kHold ? kSubDim : 1;
  VF held[kHeld][kGroup];
  VF best[kGroup], second[kGroup];
  VI block[kGroup];
  // Wide tokens are read again for every centroid: from a copy, whose rows are side by side.
  HWY_ALIGN float copy[!kHold ? kMaxSubDim * kGroup * HWY_MAX_BYTES / sizeof(float) : 1];
  for (int i = 0; i < dims; ++i) {
    for (int g = 0; g < kGroup; ++g) {
      const VF value = hn::LoadU(df, x + i * x_stride + g * lanes);
      if (!kHold) {
        hn::StoreU(value, df, copy + (i * kGroup + g) * lanes);
      } else {
        held[i % kHeld][g] = value;
      }
    }
  }
  for (int g = 0; g < kGroup; ++g) {
    best[g] = second[g] = hn::Set(df, -float_of(0x7f800000u));
    block[g] = hn::Zero(di);
  }
  const float* HWY_RESTRICT row = table.rows;
  const float* HWY_RESTRICT bias = table.bias;
  for (int b = 0; b < table.n_blocks; ++b) {
    VF top[kGroup];
    for (int g = 0; g < kGroup; ++g) top[g] = hn::Set(df, -float_of(0x7f800000u));
    for (int k = 0; k < lanes; ++k, row += dims) {
      VF score[kGroup];
      const VF start = hn::Set(df, *bias++);
      for (int g = 0; g < kGroup; ++g) score[g] = start;
      for (int i = 0; i < dims; ++i) {
        const VF centroid = hn::Set(df, row[i]);
        for (int g = 0; g < kGroup; ++g) {
          const VF value =
              !kHold ? hn::Load(df, copy + (i * kGroup + g) * lanes) : held[i % kHeld][g];
          score[g] = hn::MulAdd(value, centroid, score[g]);
        }
      }
      for (int g = 0; g < kGroup; ++g) top[g] = hn::Max(top[g], score[g]);
    }
    const VI here = hn::Set(di, b);
    for (int g = 0; g < kGroup; ++g) {
      const auto better = hn::Gt(top[g], best[g]);
      second[g] = hn::Max(second[g], hn::Min(top[g], best[g]));
      block[g] = hn::IfThenElse(hn::RebindMask(di, better), here, block[g]);
      best[g] = hn::Max(best[g], top[g]);
    }
  }
  // With u = 2^-24, X = |x|^2 and C = max |c|^2: two scores err by (3d + 2) u (X + C) together, and
  // a direct distance by a factor 1 +- (d + 2) u, which is (3d + 6) u (X + C) in scores.
  const float margin = static_cast<float>(8 * dims + 16) * 0x1p-24f;
  HWY_ALIGN int32_t blocks[kGroup * HWY_MAX_BYTES / sizeof(int32_t)];
  HWY_ALIGN float gaps[kGroup * HWY_MAX_BYTES / sizeof(float)];
  bool all_sure = true, all_covered = true;
  for (int g = 0; g < kGroup; ++g) {
    VF size = hn::Set(df, table.largest);
    for (int i = 0; i < dims; ++i) {
      const VF value = !kHold ? hn::Load(df, copy + (i * kGroup + g) * lanes) : held[i % kHeld][g];
      size = hn::MulAdd(value, value, size);
    }
    const VF threshold = hn::NegMulAdd(size, hn::Set(df, margin), best[g]);
    // Within these bounds nothing overflows and what underflows is far below the margin.
    const auto covered =
        hn::And(hn::Ge(size, hn::Set(df, 1e-30f)), hn::Le(size, hn::Set(df, 1e30f)));
    all_covered = all_covered && hn::AllTrue(df, covered);
    all_sure = all_sure && hn::AllTrue(df, hn::Lt(second[g], threshold));
    hn::StoreU(block[g], di, blocks + g * lanes);
    hn::StoreU(hn::Sub(second[g], threshold), df, gaps + g * lanes);
  }
  if (HWY_UNLIKELY(!all_covered)) {
    nearest_group<kSubDim, kGroup>(x, x_stride, table.rows, n_centroids, sub_dim, codes, distance);
    return;
  }
  for (int t = 0; t < kGroup * lanes; ++t) {
    float least = float_of(0x7f800000u);
    int code = 0;
    if (HWY_LIKELY(all_sure || gaps[t] < 0.0f)) {
      check_block<kSubDim>(x + t, x_stride, sub_dim, blocks[t], table, least, code);
    } else {
      for (int b = 0; b < table.n_blocks; ++b) {
        check_block<kSubDim>(x + t, x_stride, sub_dim, b, table, least, code);
      }
    }
    codes[t] = static_cast<uint16_t>(code);
    if (distance != nullptr) distance[t] = least;
  }
}

// kGroup vectors of tokens at a time, then one, then a padded copy of the rest.
template <int kGroup, class Many, class One>
HWY_INLINE void in_groups(const float* x, int64_t x_stride, int64_t n, int sub_dim, uint16_t* codes,
                          float* distance, const Many& many, const One& one) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(F32()));
  int64_t t = 0;
  auto at = [&](int64_t i) { return distance == nullptr ? nullptr : distance + i; };
  for (; t + kGroup * lanes <= n; t += kGroup * lanes) many(x + t, x_stride, codes + t, at(t));
  for (; t + lanes <= n; t += lanes) one(x + t, x_stride, codes + t, at(t));
  if (t == n) return;
  HWY_ALIGN float padded[kMaxSubDim * HWY_MAX_BYTES / sizeof(float)] = {};
  HWY_ALIGN uint16_t padded_codes[HWY_MAX_BYTES / sizeof(float)] = {};
  HWY_ALIGN float padded_distance[HWY_MAX_BYTES / sizeof(float)] = {};
  const int64_t rest = n - t;
  for (int i = 0; i < sub_dim; ++i) {
    for (int64_t k = 0; k < lanes; ++k) {
      padded[i * lanes + k] = x[i * x_stride + t + std::min(k, rest - 1)];
    }
  }
  one(padded, lanes, padded_codes, padded_distance);
  for (int64_t k = 0; k < rest; ++k) {
    codes[t + k] = padded_codes[k];
    if (distance != nullptr) distance[t + k] = padded_distance[k];
  }
}

template <int kSubDim>
void nearest_run(const float* x, int64_t x_stride, int64_t n, const float* table, int n_centroids,
                 int sub_dim, uint16_t* codes, float* distance) {
  // Below, preparing the table costs more than the filter saves.
  constexpr int kFilterCentroids = 32, kFilterTokens = 16;
  // Measured: 4 spills registers, even with AVX-512's 32. Wide tokens are not in registers anyway.
  constexpr int kGroup = kSubDim != 0 && kSubDim <= 8 ? 2 : 4;
  if (HWY_TARGET != HWY_SCALAR && kSubDim != 1 && n_centroids >= kFilterCentroids &&
      n_centroids <= kRunCentroids && n >= kFilterTokens) {
    FilterTable<kSubDim == 0 ? kMaxSubDim : kSubDim> prepared;
    prepare<kSubDim>(table, n_centroids, sub_dim, prepared);
    if (prepared.largest <= 1e30f) {
      in_groups<kGroup>(
          x, x_stride, n, sub_dim, codes, distance,
          [&](const float* part, int64_t stride, uint16_t* code, float* least) HWY_ATTR {
            filter_group<kSubDim, kGroup>(part, stride, prepared, n_centroids, sub_dim, code,
                                          least);
          },
          [&](const float* part, int64_t stride, uint16_t* code, float* least) HWY_ATTR {
            filter_group<kSubDim, 1>(part, stride, prepared, n_centroids, sub_dim, code, least);
          });
      return;
    }
  }
  in_groups<kGroup>(
      x, x_stride, n, sub_dim, codes, distance,
      [&](const float* part, int64_t stride, uint16_t* code, float* least) HWY_ATTR {
        nearest_group<kSubDim, kGroup>(part, stride, table, n_centroids, sub_dim, code, least);
      },
      [&](const float* part, int64_t stride, uint16_t* code, float* least) HWY_ATTR {
        nearest_group<kSubDim, 1>(part, stride, table, n_centroids, sub_dim, code, least);
      });
}

// Large tables in runs of kRunCentroids; a later run wins only where it is nearer.
template <int kSubDim>
void nearest_runs(const float* x, int64_t x_stride, int64_t n, const float* table, int n_centroids,
                  int sub_dim, uint16_t* codes, float* distance) {
  if (n_centroids <= kRunCentroids) {
    return nearest_run<kSubDim>(x, x_stride, n, table, n_centroids, sub_dim, codes, distance);
  }
  constexpr int64_t kTokens = 512;
  uint16_t code[kTokens];
  float best[kTokens], least[kTokens];
  for (int64_t t = 0; t < n; t += kTokens) {
    const int64_t count = std::min(kTokens, n - t);
    for (int c = 0; c < n_centroids; c += kRunCentroids) {
      nearest_run<kSubDim>(x + t, x_stride, count, table + int64_t{c} * sub_dim,
                           std::min(kRunCentroids, n_centroids - c), sub_dim, code, least);
      for (int64_t k = 0; k < count; ++k) {
        if (c != 0 && !(least[k] < best[k])) continue;
        best[k] = least[k];
        codes[t + k] = static_cast<uint16_t>(code[k] + c);
      }
    }
    if (distance != nullptr) std::copy(best, best + count, distance + t);
  }
}

inline void nearest_centroids(const float* x, int64_t x_stride, int64_t n, const float* table,
                              int n_centroids, int sub_dim, uint16_t* codes, float* distance) {
  switch (sub_dim) {
    case 1:
      return nearest_runs<1>(x, x_stride, n, table, n_centroids, sub_dim, codes, distance);
    case 2:
      return nearest_runs<2>(x, x_stride, n, table, n_centroids, sub_dim, codes, distance);
    case 4:
      return nearest_runs<4>(x, x_stride, n, table, n_centroids, sub_dim, codes, distance);
    case 8:
      return nearest_runs<8>(x, x_stride, n, table, n_centroids, sub_dim, codes, distance);
    case 16:
      return nearest_runs<16>(x, x_stride, n, table, n_centroids, sub_dim, codes, distance);
    default:
      return nearest_runs<0>(x, x_stride, n, table, n_centroids, sub_dim, codes, distance);
  }
}

}  // namespace veloxquant::vecinfer::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
