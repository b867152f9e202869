// Products of 16-bit tiles: a tensor core's 16 x 8 += 16 x 16 . 16 x 8 on CUDA; elsewhere the same
// by shuffles, so that kernels made of it run on the MSL machine.
//
// Lane l has g = l / 4, c = l % 4. Operand A (rows): words of rows g, g + 8, g, g + 8, columns
// 2 c, 2 c + 1 and those + 8. Operand B (columns): two words of column g, rows 2 c, 2 c + 1 and
// those + 8. Sums: row g columns 2 c, 2 c + 1, then row g + 8.
#pragma once

#include "src/backends/metal/common.h"

// Of loops over what a thread holds in registers.
#define VQ_UNROLL _Pragma("unroll")
// A pointer into memory of the threadgroup.
#if defined(__METAL_VERSION__)
#define VQ_GROUP threadgroup
#else
#define VQ_GROUP
#endif

namespace veloxquant {

// Two halves in a word, `first` in the low bits.
VQ_FN uint32_t half_pair(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return (uint32_t)as_type<ushort>((half)first) | ((uint32_t)as_type<ushort>((half)second) << 16);
#endif
}
VQ_FN float half_of_pair(uint32_t pair, int i) {
  return (float)as_type<half>((ushort)(pair >> (16 * i)));
}

VQ_FN uint32_t first_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | (b << 16); }
VQ_FN uint32_t second_halves(uint32_t a, uint32_t b) { return (a >> 16) | (b & 0xffff0000u); }

// a - b, a * b of both halves.
VQ_FN uint32_t half_differences(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
#else
  return half_pair(half_of_pair(a, 0) - half_of_pair(b, 0),
                   half_of_pair(a, 1) - half_of_pair(b, 1));
#endif
}
VQ_FN uint32_t half_products(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
#else
  return half_pair(half_of_pair(a, 0) * half_of_pair(b, 0),
                   half_of_pair(a, 1) * half_of_pair(b, 1));
#endif
}

// 2^x, 0 for -inf; within 2^-22.
VQ_FN float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2(x);
#endif
}

#if !defined(__CUDA_ARCH__)
VQ_FN float pair_product(uint32_t a, uint32_t b) {
  return fma(half_of_pair(a, 0), half_of_pair(b, 0), half_of_pair(a, 1) * half_of_pair(b, 1));
}
#endif

// sums += a b. All lanes.
VQ_FN void add_product(VQ_THREAD float* sums, uint4 a, uint32_t b0, uint32_t b1, uint lane) {
#if defined(__CUDA_ARCH__)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
#else
  const uint2 column = {b0, b1};
  for (uint n = 0; n < 4; ++n) {
    const uint4 row = simd_shuffle(a, (ushort)(lane / 4 * 4 + n));
    for (uint e = 0; e < 2; ++e) {
      const uint2 b = simd_shuffle(column, (ushort)(4 * (2 * (lane % 4) + e) + n));
      sums[e] += pair_product(row.x, b.x) + pair_product(row.z, b.y);
      sums[2 + e] += pair_product(row.y, b.x) + pair_product(row.w, b.y);
    }
  }
#endif
}

// Asks for words that are wanted soon: lines of 128 bytes, a lane each.
template <int WORDS, class Words>
VQ_FN void ask_for(Words words, uint lane) {
#if defined(__CUDA_ARCH__)
  for (uint i = 32 * lane; i < WORDS; i += 1024) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(words + i));
  }
#endif
}

}  // namespace veloxquant
