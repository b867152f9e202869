// The rotation of one row in registers, for the current Highway target: included inside a
// foreach_target file, once per SIMD level. The same bits as src/math/hadamard.h and rotation.h:
// every element sees the same additions, whatever the vector width.

// Highway's own include guard: this text is compiled once per target.
#if defined(VELOXQUANT_CODECS_HADAMARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef VELOXQUANT_CODECS_HADAMARD_INL_H_
#undef VELOXQUANT_CODECS_HADAMARD_INL_H_
#else
#define VELOXQUANT_CODECS_HADAMARD_INL_H_
#endif

#include <hwy/highway.h>

#include "src/backends/cpu/unroll.h"
#include "src/math/hadamard.h"
#include "src/math/rotation.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET == HWY_SCALAR

// x = hadamard_row of src/math of `from` (x itself, or apart from it), multiplied by `signs` before
// where they are given.
HWY_INLINE void hadamard_signed_row(const float* from, float* x, int head_dim,
                                    const float* HWY_RESTRICT signs) {
  for (int i = 0; i < head_dim; ++i) x[i] = signs == nullptr ? from[i] : mul(from[i], signs[i]);
  hadamard_row(x, head_dim);
}

#else

// At most 16 lanes: the widest of the targets that the library is built for.
using RowF32 = hn::CappedTag<float, 16>;
using RowVec = hn::Vec<RowF32>;

// v with the lanes that the stride pairs exchanged.
template <int kStride>
HWY_INLINE RowVec swap_lanes(RowVec v) {
  const RowF32 d;
  if constexpr (kStride == 1) {
    return hn::Shuffle2301(v);
  } else if constexpr (kStride == 2) {
    return hn::Shuffle1032(v);
  } else if constexpr (kStride * 2 == HWY_MAX_BYTES / 4 || HWY_MAX_BYTES == 16) {
    return hn::ConcatLowerUpper(d, v, v);
  } else {
    return hn::SwapAdjacentBlocks(v);
  }
}

// One stage inside a vector: (a, b) -> (a + b, a - b). a - b is computed as a + (-b), the same
// number.
template <int kStride>
HWY_INLINE RowVec stage_inside(RowVec v) {
  const RowF32 d;
  const hn::RebindToUnsigned<RowF32> du;
  // The sign bit of the lanes that hold a b.
  HWY_ALIGN static constexpr uint32_t kFlip[16] = {
      0,
      (1 & kStride) ? 0x80000000u : 0,
      (2 & kStride) ? 0x80000000u : 0,
      (3 & kStride) ? 0x80000000u : 0,
      (4 & kStride) ? 0x80000000u : 0,
      (5 & kStride) ? 0x80000000u : 0,
      (6 & kStride) ? 0x80000000u : 0,
      (7 & kStride) ? 0x80000000u : 0,
      (8 & kStride) ? 0x80000000u : 0,
      (9 & kStride) ? 0x80000000u : 0,
      (10 & kStride) ? 0x80000000u : 0,
      (11 & kStride) ? 0x80000000u : 0,
      (12 & kStride) ? 0x80000000u : 0,
      (13 & kStride) ? 0x80000000u : 0,
      (14 & kStride) ? 0x80000000u : 0,
      (15 & kStride) ? 0x80000000u : 0,
  };
  return hn::Add(swap_lanes<kStride>(v), hn::Xor(v, hn::BitCast(d, hn::Load(du, kFlip))));
}

// All stages whose stride is below the vector width.
HWY_INLINE RowVec stages_inside(RowVec v) {
  v = stage_inside<1>(v);
  v = stage_inside<2>(v);
#if HWY_MAX_BYTES >= 32
  v = stage_inside<4>(v);
#endif
#if HWY_MAX_BYTES >= 64
  v = stage_inside<8>(v);
#endif
  return v;
}

#if HWY_MAX_BYTES == 64
// The same for two vectors at once, with two instructions a vector and stage instead of three: the
// lanes that a stage pairs are gathered from both, so that one vector gets all sums, the other all
// differences. Each stage thereby moves the bit of the lane that it takes to the bit that tells the
// vectors apart; after four, lanes are numbered (8, 4, 2, 1 -> vector, 8, 4, 2; vector -> 1), which
// the last step undoes.
HWY_INLINE void stages_inside_two(RowVec& first, RowVec& second) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  __m512 a = first.raw, b = second.raw;
  const auto sums = [&](__m512 lower, __m512 upper) HWY_ATTR {
    a = _mm512_add_ps(lower, upper);
    b = _mm512_sub_ps(lower, upper);
  };
  sums(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  sums(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  sums(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  sums(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  first = RowVec{_mm512_permutex2var_ps(a, even, b)};
  second = RowVec{_mm512_permutex2var_ps(a, odd, b)};
}
#endif

// Of kVectors vectors.
template <int kVectors>
HWY_INLINE void all_stages_inside(RowVec (&v)[kVectors]) {
#if HWY_MAX_BYTES == 64
  VELOXQUANT_UNROLL
  for (int i = 0; i + 1 < kVectors; i += 2) stages_inside_two(v[i], v[i + 1]);
  if constexpr (kVectors % 2 == 1) v[kVectors - 1] = stages_inside(v[kVectors - 1]);
#else
  VELOXQUANT_UNROLL
  for (int i = 0; i < kVectors; ++i) v[i] = stages_inside(v[i]);
#endif
}

// In place on kVectors vectors that stay in registers: strides lanes, 2 lanes, ...
template <int kVectors, int kStride = 1>
HWY_INLINE void stages_across(RowVec (&v)[kVectors]) {
  if constexpr (kStride < kVectors) {
    VELOXQUANT_UNROLL
    for (int pair = 0; pair < kVectors / 2; ++pair) {
      const int j = pair / kStride * 2 * kStride + pair % kStride;
      const RowVec a = v[j], b = v[j + kStride];
      v[j] = hn::Add(a, b);
      v[j + kStride] = hn::Sub(a, b);
    }
    stages_across<kVectors, 2 * kStride>(v);
  }
}

// One Hadamard block of kVectors vectors, in registers. `signs` (+-1, or null) multiply the input.
template <int kVectors, bool kSigned, bool kScaled>
HWY_INLINE void hadamard_registers(const float* from, float* x, const float* HWY_RESTRICT signs,
                                   float scale) {
  const RowF32 d;
  constexpr int kLanes = HWY_LANES(float);
  const RowVec factor = hn::Set(d, scale);
  RowVec v[kVectors];
  VELOXQUANT_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    v[i] = hn::LoadU(d, from + i * kLanes);
    if (kSigned) v[i] = hn::Mul(v[i], hn::LoadU(d, signs + i * kLanes));
  }
  all_stages_inside(v);
  stages_across(v);
  VELOXQUANT_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    hn::StoreU(kScaled ? hn::Mul(v[i], factor) : v[i], d, x + i * kLanes);
  }
}

// Stages `stride` (and 2 * stride where kStages is 2) over memory, for blocks that exceed the
// registers.
template <int kStages, bool kScaled>
HWY_INLINE void hadamard_memory(float* HWY_RESTRICT x, int block, int stride, float scale) {
  const RowF32 d;
  constexpr int kLanes = HWY_LANES(float), kRows = 1 << kStages;
  const RowVec factor = hn::Set(d, scale);
  for (int i = 0; i < block; i += kRows * stride) {
    for (int j = i; j < i + stride; j += kLanes) {
      RowVec v[kRows];
      VELOXQUANT_UNROLL
      for (int k = 0; k < kRows; ++k) v[k] = hn::LoadU(d, x + j + k * stride);
      stages_across(v);
      VELOXQUANT_UNROLL
      for (int k = 0; k < kRows; ++k) {
        hn::StoreU(kScaled ? hn::Mul(v[k], factor) : v[k], d, x + j + k * stride);
      }
    }
  }
}

// One block of a power of two, at least a vector.
template <bool kSigned>
HWY_INLINE void hadamard_vectors(const float* from, float* x, int block,
                                 const float* HWY_RESTRICT signs) {
  constexpr int kLanes = HWY_LANES(float);
  constexpr int kHeld = 8;  // vectors: half of the 16 registers, the rest are temporaries
  const float scale = hadamard_scale(block);
  switch (block / kLanes) {
    case 1:
      return hadamard_registers<1, kSigned, true>(from, x, signs, scale);
    case 2:
      return hadamard_registers<2, kSigned, true>(from, x, signs, scale);
    case 4:
      return hadamard_registers<4, kSigned, true>(from, x, signs, scale);
    case 8:
      return hadamard_registers<8, kSigned, true>(from, x, signs, scale);
    default:
      break;
  }
  for (int i = 0; i < block; i += kHeld * kLanes) {
    hadamard_registers<kHeld, kSigned, false>(from + i, x + i, kSigned ? signs + i : nullptr,
                                              scale);
  }
  int stride = kHeld * kLanes;
  for (; 4 * stride < block; stride *= 4) hadamard_memory<2, false>(x, block, stride, scale);
  if (4 * stride == block) {
    hadamard_memory<2, true>(x, block, stride, scale);
  } else {
    hadamard_memory<1, true>(x, block, stride, scale);
  }
}

HWY_INLINE void hadamard_one_block(const float* from, float* x, int block,
                                   const float* HWY_RESTRICT signs) {
  if (block < HWY_LANES(float)) {
    for (int i = 0; i < block; ++i) x[i] = signs == nullptr ? from[i] : mul(from[i], signs[i]);
    return hadamard_row(x, block);
  }
  return signs == nullptr ? hadamard_vectors<false>(from, x, block, signs)
                          : hadamard_vectors<true>(from, x, block, signs);
}

HWY_INLINE void hadamard_signed_row(const float* from, float* x, int head_dim,
                                    const float* HWY_RESTRICT signs) {
  for (int start = 0; start < head_dim;) {
    const int block = hadamard_block(head_dim - start);
    hadamard_one_block(from + start, x + start, block, signs == nullptr ? nullptr : signs + start);
    start += block;
  }
}

#endif  // HWY_TARGET == HWY_SCALAR

HWY_INLINE void hadamard_signed_row(float* x, int head_dim, const float* HWY_RESTRICT signs) {
  hadamard_signed_row(x, x, head_dim, signs);
}

// rotate_row of src/math. scratch: head_dim values, used where head_dim is no power of two.
HWY_INLINE void rotate_row_simd(const float* HWY_RESTRICT signs, int head_dim, int step,
                                float* HWY_RESTRICT x, float* HWY_RESTRICT scratch) {
  hadamard_signed_row(x, head_dim, signs);
  if (step != 1) {
    for (int i = 0, to = 0; i < head_dim; ++i) {
      scratch[to] = x[i];
      to += step;
      if (to >= head_dim) to -= head_dim;
    }
    for (int i = 0; i < head_dim; ++i) x[i] = scratch[i];
  }
  hadamard_signed_row(x, head_dim, signs + head_dim);
}

// rotate_row_back of src/math.
HWY_INLINE void rotate_row_back_simd(const float* HWY_RESTRICT signs, int head_dim, int step,
                                     float* HWY_RESTRICT x, float* HWY_RESTRICT scratch) {
  hadamard_signed_row(x, head_dim, nullptr);
  if (step == 1) {
    hadamard_signed_row(x, head_dim, signs + head_dim);
  } else {
    for (int i = 0; i < head_dim; ++i) scratch[i] = mul(x[i], signs[head_dim + i]);
    for (int i = 0, from = 0; i < head_dim; ++i) {
      x[i] = scratch[from];
      from += step;
      if (from >= head_dim) from -= head_dim;
    }
    hadamard_signed_row(x, head_dim, nullptr);
  }
  for (int i = 0; i < head_dim; ++i) x[i] = mul(x[i], signs[i]);
}

}  // namespace veloxquant::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // VELOXQUANT_CODECS_HADAMARD_INL_H_
