// Rotary embeddings on the CPU: compiled once per SIMD level, vectorised over tokens.
#include "src/codecs/rope/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/rope/cpu.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include "src/math/sincos.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant::rope::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F64 = hn::CappedTag<double, 64>;
using U64 = hn::RebindToUnsigned<F64>;
using F32 = hn::Rebind<float, F64>;

// sincos() of src/math/sincos.h, step by step.
HWY_INLINE void sincos_lanes(hn::Vec<F32> angle, hn::Vec<F64>& sine, hn::Vec<F64>& cosine) {
  const F64 d;
  const U64 du;
  const F32 d32;
  const auto phase = hn::Lt(hn::Abs(angle), hn::Set(d32, kMaxAngle));
  const auto x = hn::PromoteTo(d, hn::IfThenElseZero(phase, angle));
  const auto shifted = hn::Add(hn::Mul(x, hn::Set(d, kTwoOverPi)), hn::Set(d, kRoundDouble));
  const auto n = hn::Sub(shifted, hn::Set(d, kRoundDouble));
  auto r = hn::Sub(x, hn::Mul(n, hn::Set(d, kHalfPi1)));
  r = hn::Sub(r, hn::Mul(n, hn::Set(d, kHalfPi2)));
  r = hn::Sub(r, hn::Mul(n, hn::Set(d, kHalfPi3)));
  const auto z = hn::Mul(r, r);
  auto s = hn::Set(d, kSin[5]), c = hn::Set(d, kCos[5]);
  for (int i = 4; i >= 0; --i) {
    s = hn::Add(hn::Mul(s, z), hn::Set(d, kSin[i]));
    c = hn::Add(hn::Mul(c, z), hn::Set(d, kCos[i]));
  }
  s = hn::Add(r, hn::Mul(hn::Mul(r, z), s));
  c = hn::Add(hn::Sub(hn::Set(d, 1.0), hn::Mul(hn::Set(d, 0.5), z)), hn::Mul(hn::Mul(z, z), c));
  // Bit 0 of the quadrant swaps, bit 1 negates the sine, bits 0 ^ 1 the cosine.
  const auto quadrant = hn::BitCast(du, shifted);
  const auto odd =
      hn::MaskFromVec(hn::BitCast(d, hn::Sub(hn::Zero(du), hn::And(quadrant, hn::Set(du, 1)))));
  const auto a = hn::IfThenElse(odd, c, s), b = hn::IfThenElse(odd, s, c);
  const auto high = hn::And(quadrant, hn::Set(du, 2));
  const auto differ = hn::And(hn::Xor(hn::Add(quadrant, quadrant), quadrant), hn::Set(du, 2));
  sine = hn::Xor(a, hn::BitCast(d, hn::ShiftLeft<62>(high)));
  cosine = hn::Xor(b, hn::BitCast(d, hn::ShiftLeft<62>(differ)));
}

void tables(const float* HWY_RESTRICT inv_freq, int n_pairs, const float* HWY_RESTRICT scaled,
            double factor, float* HWY_RESTRICT cosines, float* HWY_RESTRICT sines) {
  const F64 d;
  const F32 d32;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const auto scale = hn::Set(d, factor);
  for (int j = 0; j < n_pairs; ++j) {
    const auto frequency = hn::Set(d32, inv_freq[j]);
    for (int t = 0; t < kTokens; t += lanes) {
      hn::Vec<F64> sine, cosine;
      sincos_lanes(hn::Mul(hn::LoadU(d32, scaled + t), frequency), sine, cosine);
      hn::StoreU(hn::DemoteTo(d32, hn::Mul(scale, cosine)), d32, cosines + j * kTokens + t);
      hn::StoreU(hn::DemoteTo(d32, hn::Mul(scale, sine)), d32, sines + j * kTokens + t);
    }
  }
}

void turn(const RopePair* pairs, int n_pairs, RopeDirection direction,
          const float* HWY_RESTRICT cosines, const float* HWY_RESTRICT sines,
          float* HWY_RESTRICT x_t) {
  const hn::CappedTag<float, 64> d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const bool forward = direction == RopeDirection::forward;
  for (int j = 0; j < n_pairs; ++j) {
    float* first = x_t + pairs[j].first * kTokens;
    float* second = x_t + pairs[j].second * kTokens;
    for (int t = 0; t < kTokens; t += lanes) {
      const auto c = hn::LoadU(d, cosines + j * kTokens + t);
      const auto s = hn::LoadU(d, sines + j * kTokens + t);
      const auto a = hn::LoadU(d, first + t), b = hn::LoadU(d, second + t);
      const auto ac = hn::Mul(a, c), bs = hn::Mul(b, s), as = hn::Mul(a, s), bc = hn::Mul(b, c);
      hn::StoreU(forward ? hn::Sub(ac, bs) : hn::Add(ac, bs), d, first + t);
      hn::StoreU(forward ? hn::Add(as, bc) : hn::Sub(bc, as), d, second + t);
    }
  }
}

}  // namespace veloxquant::rope::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "src/backends/cpu/simd_targets.h"

namespace veloxquant::rope {

HWY_EXPORT(tables);
HWY_EXPORT(turn);

const Kernels& cpu_kernels() {
  cpu::apply_environment();
  static const Kernels kernels{
      [](const float* inv_freq, int n_pairs, const float* scaled, double factor, float* cosines,
         float* sines) {
        HWY_DYNAMIC_DISPATCH(tables)(inv_freq, n_pairs, scaled, factor, cosines, sines);
      },
      [](const RopePair* pairs, int n_pairs, RopeDirection direction, const float* cosines,
         const float* sines, float* x_t) {
        HWY_DYNAMIC_DISPATCH(turn)(pairs, n_pairs, direction, cosines, sines, x_t);
      }};
  return kernels;
}

}  // namespace veloxquant::rope
#endif  // HWY_ONCE
