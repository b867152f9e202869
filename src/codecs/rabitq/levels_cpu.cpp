// Levels and planes with Highway, vectorised over the 64 tokens of a tile: every sum over rows
// keeps the order of the reference.
#include "src/codecs/rabitq/levels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/rabitq/levels_cpu.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>

HWY_BEFORE_NAMESPACE();
namespace veloxquant::rabitq::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::CappedTag<float, kBlockTokens>;
using I32 = hn::RebindToSigned<F32>;
using U32 = hn::RebindToUnsigned<F32>;
using VF = hn::Vec<F32>;
using VI = hn::Vec<I32>;

HWY_INLINE int lanes_of_tile() { return static_cast<int>(hn::Lanes(F32())); }

// whole_steps() of math, for a vector of tokens.
HWY_INLINE VI steps_of(VF magnitude, VF inverse_step, VF most) {
  return hn::ConvertTo(I32(), hn::Min(hn::Mul(magnitude, inverse_step), most));
}

HWY_INLINE VF level_of(VI steps) {
  return hn::ConvertTo(F32(), hn::Add(hn::Add(steps, steps), hn::Set(I32(), 1)));
}

HWY_INLINE VF square_sum(const float* HWY_RESTRICT y, int rows) {
  const F32 df;
  VF sum = hn::Zero(df);
  for (int r = 0; r < rows; ++r) {
    const VF value = hn::LoadU(df, y + r * kBlockTokens);
    sum = hn::Add(sum, hn::Mul(value, value));
  }
  return sum;
}

// best_inverse_step() of the reference, for a vector of tokens.
HWY_INLINE VF best_step(const float* HWY_RESTRICT y, int rows, int bits, VF squares, VF most) {
  const F32 df;
  const VF inverse_rows = hn::Set(df, 1.0f / static_cast<float>(rows));
  const VF rms = hn::Sqrt(hn::Mul(squares, inverse_rows));
  const VF one = hn::Set(df, 1.0f), zero = hn::Zero(df);
  const VF inverse_rms = hn::IfThenElseZero(hn::Gt(squares, zero), hn::Div(one, rms));
  const VF inverse = hn::Mul(inverse_rms, hn::Set(df, kInverseStep[bits]));
  VF best = hn::Set(df, -1.0f), chosen = zero;
  for (float factor : kStepFactors) {
    const VF inverse_step = hn::Mul(inverse, hn::Set(df, factor));
    VF dots = zero, levels = zero;
    for (int r = 0; r < rows; ++r) {
      const VF magnitude = hn::Abs(hn::LoadU(df, y + r * kBlockTokens));
      const VF level = level_of(steps_of(magnitude, inverse_step, most));
      dots = hn::Add(dots, hn::Mul(magnitude, level));
      levels = hn::Add(levels, hn::Mul(level, level));
    }
    const VF cosine = hn::Div(hn::Mul(dots, dots), levels);
    const auto better = hn::Gt(cosine, best);
    best = hn::IfThenElse(better, cosine, best);
    chosen = hn::IfThenElse(better, inverse_step, chosen);
  }
  return chosen;
}

// The bits of a mask as the lowest bits of a number.
template <class Mask>
HWY_INLINE uint64_t bits_of_mask(Mask mask) {
  uint8_t bytes[8] = {};
  hn::StoreMaskBits(F32(), mask, bytes);
  uint64_t bits;
  std::memcpy(&bits, bytes, sizeof(bits));
  return bits;
}

// Least significant byte first on every machine.
HWY_INLINE void store_plane(uint64_t bits, uint8_t* plane) {
  for (int b = 0; b < kPlaneBytes; ++b) plane[b] = static_cast<uint8_t>(bits >> (8 * b));
}

void encode(const float* y_t, int rows, int bits, uint8_t* planes, float* squares, float* dots,
            float* levels) {
  const F32 df;
  const I32 di;
  const int lanes = lanes_of_tile();
  const int middle = 1 << (bits - 1);
  const VF most = hn::Set(df, static_cast<float>(middle - 1)), zero = hn::Zero(df);
  HWY_ALIGN float inverse_steps[kBlockTokens];
  for (int t = 0; t < kBlockTokens; t += lanes) {
    const VF sum = square_sum(y_t + t, rows);
    hn::StoreU(sum, df, squares + t);
    const VF step = bits == 1 ? zero : best_step(y_t + t, rows, bits, sum, most);
    hn::Store(step, df, inverse_steps + t);
    hn::StoreU(zero, df, dots + t);
    hn::StoreU(zero, df, levels + t);
  }
  for (int r = 0; r < rows; ++r) {
    uint64_t held[kMaxBits] = {};
    for (int t = 0; t < kBlockTokens; t += lanes) {
      const VF value = hn::LoadU(df, y_t + r * kBlockTokens + t);
      const VF magnitude = hn::Abs(value);
      const auto positive = hn::Ge(value, zero);
      if (bits == 1) {
        held[0] |= bits_of_mask(positive) << t;
        hn::StoreU(hn::Add(hn::LoadU(df, dots + t), magnitude), df, dots + t);
        continue;
      }
      const VI steps = steps_of(magnitude, hn::Load(df, inverse_steps + t), most);
      const VF level = level_of(steps);
      hn::StoreU(hn::Add(hn::LoadU(df, dots + t), hn::Mul(magnitude, level)), df, dots + t);
      hn::StoreU(hn::Add(hn::LoadU(df, levels + t), hn::Mul(level, level)), df, levels + t);
      const VI up = hn::Add(hn::Set(di, middle), steps);
      const VI code = hn::IfThenElse(hn::RebindMask(di, positive), up,
                                     hn::Sub(hn::Set(di, 2 * middle - 1), up));
      for (int p = 0; p < bits; ++p) {
        const auto set = hn::TestBit(code, hn::Set(di, 1 << p));
        held[p] |= bits_of_mask(hn::RebindMask(df, set)) << t;
      }
    }
    for (int p = 0; p < bits; ++p) store_plane(held[p], planes + (r * bits + p) * kPlaneBytes);
  }
  if (bits == 1) std::fill(levels, levels + kBlockTokens, static_cast<float>(rows));
}

// `value` with the sign of bit `lane` of `bits`: minus where the bit is 0.
HWY_INLINE VF signed_by(uint32_t bits, VF value) {
  const U32 du;
  HWY_ALIGN static constexpr uint32_t kLaneBits[16] = {
      1u << 0, 1u << 1, 1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
      1u << 8, 1u << 9, 1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15};
  static_assert(HWY_MAX_BYTES <= 64 || HWY_HAVE_SCALABLE, "a vector has at most 16 lanes");
  const auto bit = hn::And(hn::Set(du, bits), hn::LoadU(du, kLaneBits));
  const auto clear = hn::VecFromMask(du, hn::Eq(bit, hn::Zero(du)));
  return hn::Xor(value, hn::BitCast(F32(), hn::And(clear, hn::Set(du, 0x80000000u))));
}

template <int kBits>
HWY_INLINE void decode_rows(const uint8_t* HWY_RESTRICT planes, int rows,
                            const float* HWY_RESTRICT scale, const float* HWY_RESTRICT mean,
                            float* HWY_RESTRICT y_t) {
  const F32 df;
  const int lanes = lanes_of_tile();
  for (int r = 0; r < rows; ++r) {
    uint64_t held[kBits];
    for (int p = 0; p < kBits; ++p) {
      const uint8_t* plane = planes + (r * kBits + p) * kPlaneBytes;
      held[p] = 0;
      for (int b = 0; b < kPlaneBytes; ++b) held[p] |= static_cast<uint64_t>(plane[b]) << (8 * b);
    }
    for (int t = 0; t < kBlockTokens; t += lanes) {
      VF y = kBits == 1 && scale != nullptr ? hn::LoadU(df, scale + t) : hn::Set(df, 1.0f);
      y = signed_by(static_cast<uint32_t>(held[0] >> t), y);
      for (int p = 1; p < kBits; ++p) {
        const VF power = hn::Set(df, static_cast<float>(1 << p));
        y = hn::Add(y, signed_by(static_cast<uint32_t>(held[p] >> t), power));  // exact
      }
      if (kBits > 1 && scale != nullptr) y = hn::Mul(y, hn::LoadU(df, scale + t));
      if (mean != nullptr) y = hn::Add(y, hn::Set(df, mean[r]));
      hn::StoreU(y, df, y_t + r * kBlockTokens + t);
    }
  }
}

void decode(const uint8_t* planes, int rows, int bits, const float* scale, const float* mean,
            float* y_t) {
  switch (bits) {
    case 1:
      return decode_rows<1>(planes, rows, scale, mean, y_t);
    case 2:
      return decode_rows<2>(planes, rows, scale, mean, y_t);
    case 3:
      return decode_rows<3>(planes, rows, scale, mean, y_t);
    default:
      return decode_rows<4>(planes, rows, scale, mean, y_t);
  }
}

}  // namespace veloxquant::rabitq::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "src/backends/cpu/simd_targets.h"

namespace veloxquant::rabitq {

HWY_EXPORT(encode);
HWY_EXPORT(decode);

const LevelKernels& cpu_levels() {
  cpu::apply_environment();
  static const LevelKernels kernels{[](const float* y_t, int rows, int bits, uint8_t* planes,
                                       float* squares, float* dots, float* levels) {
                                      HWY_DYNAMIC_DISPATCH(encode)
                                      (y_t, rows, bits, planes, squares, dots, levels);
                                    },
                                    [](const uint8_t* planes, int rows, int bits,
                                       const float* scale, const float* mean, float* y_t) {
                                      HWY_DYNAMIC_DISPATCH(decode)
                                      (planes, rows, bits, scale, mean, y_t);
                                    }};
  return kernels;
}

}  // namespace veloxquant::rabitq
#endif  // HWY_ONCE
