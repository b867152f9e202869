#include "src/backends/cpu/convert.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/backends/cpu/convert.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include "src/math/float16.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr bool kHardwareHalf =
    HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_SSSE3 && HWY_TARGET != HWY_SSE4;

void widen_f16(const uint16_t* HWY_RESTRICT from, int64_t n, float* HWY_RESTRICT to) {
  const hn::ScalableTag<float> df;
  const hn::Rebind<hwy::float16_t, decltype(df)> df16;
  const hn::Rebind<uint16_t, decltype(df)> du16;
  const hn::RebindToUnsigned<decltype(df)> du;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto half = hn::LoadU(du16, from + i);
    auto bits = hn::BitCast(du, hn::PromoteTo(df, hn::BitCast(df16, half)));
    if (!kHardwareHalf) {
      // Highway's software conversion takes infinity and NaN for large numbers.
      const auto exponent = hn::Set(du, 0x7c00u);
      const auto special = hn::Eq(hn::And(hn::PromoteTo(du, half), exponent), exponent);
      bits = hn::Or(bits, hn::IfThenElseZero(special, hn::Set(du, 0x7f800000u)));
    }
    hn::StoreU(hn::BitCast(df, bits), df, to + i);
  }
  for (; i < n; ++i) to[i] = f16_to_f32(from[i]);
}

void widen_bf16(const uint16_t* HWY_RESTRICT from, int64_t n, float* HWY_RESTRICT to) {
  for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_f32(from[i]);
}

// A plain loop over the shared arithmetic, compiled per SIMD level: the compiler vectorises it.
// kInfinity: the bits of the 16-bit type's infinity; larger magnitudes are NaN.
template <uint16_t (*kRound)(float), uint32_t kInfinity>
HWY_INLINE int64_t narrow(const float* HWY_RESTRICT from, int64_t n, uint16_t* HWY_RESTRICT to) {
  int64_t changed = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t half = kRound(from[i]);
    const uint32_t magnitude = half & 0x7fffu;
    changed += magnitude >= kInfinity;
    if (magnitude > kInfinity) half = 0;
    if (magnitude == kInfinity) half -= 1;
    to[i] = static_cast<uint16_t>(half);
  }
  return changed;
}

int64_t narrow_f16(const float* HWY_RESTRICT from, int64_t n, uint16_t* HWY_RESTRICT to) {
  return narrow<f32_to_f16, 0x7c00u>(from, n, to);
}

int64_t narrow_bf16(const float* HWY_RESTRICT from, int64_t n, uint16_t* HWY_RESTRICT to) {
  return narrow<f32_to_bf16, 0x7f80u>(from, n, to);
}

}  // namespace veloxquant::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <cstring>

#include "src/backends/cpu/simd_targets.h"

namespace veloxquant::cpu {

HWY_EXPORT(widen_f16);
HWY_EXPORT(widen_bf16);
HWY_EXPORT(narrow_f16);
HWY_EXPORT(narrow_bf16);

void to_float(DType from_dtype, const void* from, int64_t n, float* to) {
  apply_environment();
  switch (from_dtype) {
    case DType::float32:
      std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
      return;
    case DType::float16:
      HWY_DYNAMIC_DISPATCH(widen_f16)(static_cast<const uint16_t*>(from), n, to);
      return;
    case DType::bfloat16:
      HWY_DYNAMIC_DISPATCH(widen_bf16)(static_cast<const uint16_t*>(from), n, to);
      return;
    default:
      fail("[to_float] dtype: got ", dtype_name(from_dtype),
           ", wanted float32, float16 or bfloat16");
  }
}

int64_t to_finite_16bit(DType to_dtype, const float* from, int64_t n, uint16_t* to) {
  apply_environment();
  if (to_dtype == DType::float16) return HWY_DYNAMIC_DISPATCH(narrow_f16)(from, n, to);
  if (to_dtype == DType::bfloat16) return HWY_DYNAMIC_DISPATCH(narrow_bf16)(from, n, to);
  fail("[to_finite_16bit] dtype: got ", dtype_name(to_dtype), ", wanted float16 or bfloat16");
}

}  // namespace veloxquant::cpu
#endif  // HWY_ONCE
