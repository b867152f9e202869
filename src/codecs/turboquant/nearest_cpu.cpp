// Comparisons with the steps of nearest.h, compiled once per SIMD level.
#include "src/codecs/turboquant/nearest.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/turboquant/nearest_cpu.cpp"
#include <hwy/aligned_allocator.h>
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <cstring>

#include "src/backends/cpu/unroll.h"
#include "src/codecs/hadamard-inl.h"
#include "src/math/centroids.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant::turboquant::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

HWY_INLINE void nearest_directly(const ScalarSteps& steps, const float* x, int64_t n,
                                 uint8_t* codes) {
  float distance;
  for (int64_t i = 0; i < n; ++i) {
    codes[i] = static_cast<uint8_t>(
        nearest_centroid(x + i, 1, steps.centroids, steps.n_centroids, 1, &distance));
  }
}

#if HWY_TARGET == HWY_SCALAR

void nearest_values(const ScalarSteps& steps, const float* x, int64_t n, uint8_t* codes) {
  nearest_directly(steps, x, n, codes);
}

#else

using F32 = hn::ScalableTag<float>;
using I32 = hn::RebindToSigned<F32>;
using U8 = hn::Repartition<uint8_t, I32>;
using U32 = hn::RebindToUnsigned<F32>;
using VF = hn::Vec<F32>;
using VI = hn::Vec<I32>;

constexpr int kVectors = 4;  // of floats, for one vector of codes

// -1 where x >= step, else 0.
HWY_INLINE VI at_or_above(VF x, VF step) {
  const F32 d;
  return hn::BitCast(I32(), hn::VecFromMask(d, hn::Ge(x, step)));
}

// The number of steps at or below x. kSteps: 1, 3, 7 or 15; what is missing is +infinity.
template <int kSteps>
class StepCounter {
 public:
  explicit StepCounter(const float* step) {
    const F32 d;
    for (int k = 0; k < kHeld; ++k) held_[k] = hn::Set(d, step[kSearch ? 4 * k + 3 : k]);
    HWY_ALIGN float pairs[HWY_MAX_BYTES / sizeof(float)], all[HWY_MAX_BYTES / sizeof(float)];
    for (int i = 0; i < static_cast<int>(hn::Lanes(d)); ++i) {
      pairs[i] = kSearch ? step[4 * (i % 4) + 1] : 0.0f;
      all[i] = kSearch ? step[2 * (i % 8)] : 0.0f;
    }
    pairs_ = hn::Load(d, pairs);
    all_ = hn::Load(d, all);
  }

  HWY_INLINE VI operator()(VF x) const {
    if constexpr (kSearch) return search(x);
    VI count = hn::Zero(I32());
    VELOXQUANT_UNROLL
    for (int k = 0; k < kHeld; ++k) count = hn::Sub(count, at_or_above(x, held_[k]));
    return count;
  }

 private:
  // Two steps of a binary search by selection, two by a look-up in a register of 8 floats.
  static constexpr bool kSearch = kSteps == 15 && HWY_MAX_BYTES >= 32;
  static constexpr int kHeld = kSearch ? 3 : kSteps;

  HWY_INLINE VI search(VF x) const {
    const F32 d;
    const auto upper_half = hn::Ge(x, held_[1]);
    const VI half = hn::BitCast(I32(), hn::VecFromMask(d, upper_half));
    const VI quarter = at_or_above(x, hn::IfThenElse(upper_half, held_[2], held_[0]));
    VI rank = hn::Neg(hn::Add(hn::Add(half, half), quarter));  // 0..3
    rank = hn::Sub(hn::Add(rank, rank), at_or_above(x, look_up(pairs_, rank)));
    return hn::Sub(hn::Add(rank, rank), at_or_above(x, look_up(all_, rank)));
  }
  static HWY_INLINE VF look_up(VF table, VI index) {
    const F32 d;
    return hn::TableLookupLanes(table, hn::IndicesFromVec(d, index));
  }

  VF held_[kHeld], pairs_, all_;
};

// The first 4 bytes of every block of 16, then the second 4, ...
struct BlockOrder {
  int32_t lane[HWY_MAX_BYTES / 4] = {};
  constexpr BlockOrder() {
    constexpr int kBlocks = HWY_MAX_BYTES / 16;
    for (int i = 0; i < HWY_MAX_BYTES / 4; ++i) lane[i] = i % kBlocks * 4 + i / kBlocks;
  }
};

// Four vectors of integers below 256 to one of bytes, in order.
HWY_INLINE hn::Vec<U8> as_bytes(VI a, VI b, VI c, VI d) {
  const U8 du8;
  const VI lower = hn::Or(a, hn::ShiftLeft<8>(b));
  const VI upper = hn::ShiftLeft<16>(hn::Or(c, hn::ShiftLeft<8>(d)));
  // Lane i holds element i of all four: in every 16 bytes, first 4 elements of a, then 4 of b, ...
  HWY_ALIGN static constexpr uint8_t kTranspose[16] = {0, 4, 8,  12, 1, 5, 9,  13,
                                                       2, 6, 10, 14, 3, 7, 11, 15};
  const auto bytes =
      hn::TableLookupBytes(hn::BitCast(du8, hn::Or(lower, upper)), hn::LoadDup128(du8, kTranspose));
#if HWY_MAX_BYTES >= 32
  HWY_ALIGN static constexpr BlockOrder kOrder;
  const U32 du;
  const auto lanes = hn::IndicesFromVec(du, hn::Load(I32(), kOrder.lane));
  return hn::BitCast(du8, hn::TableLookupLanes(hn::BitCast(du, bytes), lanes));
#else
  return bytes;
#endif
}

template <int kSteps>
void nearest_counted(const ScalarSteps& steps, const float* HWY_RESTRICT x, int64_t n,
                     uint8_t* HWY_RESTRICT codes) {
  const F32 d;
  const StepCounter<kSteps> counter(steps.step);
  const VF bound = hn::Set(d, steps.bound);
  const int lanes = static_cast<int>(hn::Lanes(d)), step = kVectors * lanes;
  const auto group = [&](const float* from, uint8_t* to) HWY_ATTR {
    VI count[kVectors];
    VF largest = hn::Zero(d);
    auto inside = hn::Eq(largest, largest);
    VELOXQUANT_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      const VF value = hn::LoadU(d, from + k * lanes);
      inside = hn::And(inside, hn::Le(hn::Abs(value), bound));  // false for NaN
      count[k] = counter(value);
    }
    if (HWY_UNLIKELY(!hn::AllTrue(d, inside))) {
      nearest_directly(steps, from, step, to);
      return;
    }
    hn::StoreU(as_bytes(count[0], count[1], count[2], count[3]), U8(), to);
    if (HWY_UNLIKELY(!steps.ascending)) {
      for (int k = 0; k < step; ++k) to[k] = steps.code[to[k]];
    }
  };
  int64_t i = 0;
  for (; i + step <= n; i += step) group(x + i, codes + i);
  if (i == n) return;
  HWY_ALIGN float padded[kVectors * HWY_MAX_BYTES / sizeof(float)] = {};
  HWY_ALIGN uint8_t padded_codes[HWY_MAX_BYTES];
  std::memcpy(padded, x + i, sizeof(float) * static_cast<size_t>(n - i));
  group(padded, padded_codes);
  std::memcpy(codes + i, padded_codes, static_cast<size_t>(n - i));
}

void nearest_values(const ScalarSteps& steps, const float* x, int64_t n, uint8_t* codes) {
  if (steps.n_steps <= 1) return nearest_counted<1>(steps, x, n, codes);
  if (steps.n_steps <= 3) return nearest_counted<3>(steps, x, n, codes);
  if (steps.n_steps <= 7) return nearest_counted<7>(steps, x, n, codes);
  nearest_counted<15>(steps, x, n, codes);
}

#endif  // HWY_TARGET == HWY_SCALAR

void nearest_of_hadamard(const ScalarSteps& steps, const float* rows, int64_t n_rows, int dim,
                         const float* diag, uint8_t* codes) {
  constexpr int kLineFloats = 16, kAhead = 1024;
  // Some rows at a time, which stay in L1.
  const int64_t most = HWY_MAX(1, 2048 / dim);
  const auto scratch = hwy::AllocateAligned<float>(static_cast<size_t>(most * dim));
  for (int64_t r = 0; r < n_rows; r += most) {
    const int64_t count = HWY_MIN(most, n_rows - r);
    for (int64_t i = 0; i < count; ++i) {
      float* row = scratch.get() + i * dim;
      const float* from = rows + (r + i) * dim;
      // The transform of a row is too long for the processor to look beyond it.
      for (int d = 0; d < dim; d += kLineFloats) hwy::Prefetch(from + kAhead + d);
      veloxquant::HWY_NAMESPACE::hadamard_signed_row(from, row, dim, diag);
    }
    nearest_values(steps, scratch.get(), count * dim, codes + r * dim);
  }
}

}  // namespace veloxquant::turboquant::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <algorithm>
#include <cmath>
#include <limits>

#include "src/backends/cpu/simd_targets.h"

namespace veloxquant::turboquant {

HWY_EXPORT(nearest_values);
HWY_EXPORT(nearest_of_hadamard);

namespace {

// Floats in their order, as integers.
int64_t ordinal(float x) {
  const uint32_t bits = bits_of(x);
  return bits < 0x80000000u ? int64_t{bits} : -int64_t{bits & 0x7fffffffu};
}
float from_ordinal(int64_t i) {
  return float_of(i >= 0 ? static_cast<uint32_t>(i) : static_cast<uint32_t>(-i) | 0x80000000u);
}

// The smallest float at which the upper of two neighbours wins; an equal distance goes to the
// lower index.
float step_between(const float* centroids, int lower, int upper) {
  int64_t loses = ordinal(centroids[lower]), wins = ordinal(centroids[upper]);
  while (wins - loses > 1) {
    const int64_t middle = loses + (wins - loses) / 2;
    const float x = from_ordinal(middle);
    const float to_upper = squared_distance(&x, 1, centroids + upper, 1);
    const float to_lower = squared_distance(&x, 1, centroids + lower, 1);
    const bool upper_wins = to_upper < to_lower || (to_upper == to_lower && upper < lower);
    (upper_wins ? wins : loses) = middle;
  }
  return from_ordinal(wins);
}

}  // namespace

bool find_steps(const float* centroids, int n_centroids, ScalarSteps& steps) {
  if (n_centroids < 1 || n_centroids > kMaxSteps + 1) return false;
  int order[kMaxSteps + 1], n = 0;
  float largest = 0.0f, gap = 0x1p40f;
  for (int i = 0; i < n_centroids; ++i) {
    if (!is_finite_bits(bits_of(centroids[i]))) return false;
    largest = std::max(largest, std::fabs(centroids[i]));
    order[i] = i;
  }
  std::stable_sort(order, order + n_centroids,
                   [&](int a, int b) { return centroids[a] < centroids[b]; });
  for (int i = 0; i < n_centroids; ++i) {  // of equal ones the lowest index is first
    if (i == 0 || centroids[order[i]] != centroids[order[n - 1]]) order[n++] = order[i];
  }
  for (int i = 1; i < n; ++i) gap = std::min(gap, centroids[order[i]] - centroids[order[i - 1]]);
  // With u = 2^-24 a difference x - c errs by u (|x| + |c|) at most. Where that sum is below
  // 2^20 gap, distances to two centroids on the same side of x differ by 14 u of the larger one,
  // more than two roundings of squares take away; within the other bounds no square that matters
  // underflows or overflows. So only the two neighbours of x can win.
  if (!(gap >= 0x1p-60f)) return false;
  steps.bound = std::min(0x1p60f, 0x1p20f * gap) - largest;
  if (!(steps.bound >= largest)) return false;
  steps.n_steps = n - 1;
  steps.centroids = centroids;
  steps.n_centroids = n_centroids;
  steps.ascending = true;
  std::fill_n(steps.step, kMaxSteps, std::numeric_limits<float>::infinity());
  std::fill_n(steps.code, kMaxSteps + 1, uint8_t{0});
  for (int i = 0; i < n; ++i) {
    steps.code[i] = static_cast<uint8_t>(order[i]);
    steps.ascending = steps.ascending && order[i] == i;
    if (i > 0) steps.step[i - 1] = step_between(centroids, order[i - 1], order[i]);
  }
  return true;
}

void nearest_by_steps(const ScalarSteps& steps, const float* x, int64_t n, uint8_t* codes) {
  cpu::apply_environment();
  HWY_DYNAMIC_DISPATCH(nearest_values)(steps, x, n, codes);
}

void nearest_of_hadamard_by_steps(const ScalarSteps& steps, const float* rows, int64_t n_rows,
                                  int dim, const float* diag, uint8_t* codes) {
  cpu::apply_environment();
  HWY_DYNAMIC_DISPATCH(nearest_of_hadamard)(steps, rows, n_rows, dim, diag, codes);
}

}  // namespace veloxquant::turboquant
#endif  // HWY_ONCE
