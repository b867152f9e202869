// What Metal kernels share: 16-bit results, and loops of a threadgroup over rows in its memory.
// MSL; needs <metal_stdlib> and `using namespace metal`, which MLX puts in front.
#pragma once

#include "src/math/float16.h"
#include "src/math/hadamard.h"

namespace veloxquant {

// fp32 -> T, rounded as on the CPU: by integer steps, not by the GPU's conversion.
template <class T>
struct Narrow {
  static T of(float x) { return x; }
};
template <>
struct Narrow<half> {
  static half of(float x) { return as_type<half>((ushort)f32_to_f16(x)); }
};
template <>
struct Narrow<bfloat> {
  static bfloat of(float x) { return as_type<bfloat>((ushort)f32_to_bf16(x)); }
};

// As a cache keeps it: NaN as 0, overflow as the largest finite value.
VQ_FN half finite_half(float x) {
  uint32_t bits = f32_to_f16(x);
  if ((bits & 0x7fffu) > 0x7c00u) bits = 0u;
  if ((bits & 0x7fffu) == 0x7c00u) bits -= 1u;
  return as_type<half>((ushort)bits);
}

VQ_FN bfloat finite_bfloat(float x) {
  uint32_t bits = f32_to_bf16(x);
  if ((bits & 0x7fffu) > 0x7f80u) bits = 0u;
  if ((bits & 0x7fffu) == 0x7f80u) bits -= 1u;
  return as_type<bfloat>((ushort)bits);
}
// fp32 -> T as a cache keeps it: finite.
template <class T>
struct FiniteNarrow {
  static T of(float x) { return x; }
};
template <>
struct FiniteNarrow<half> {
  static half of(float x) { return finite_half(x); }
};
template <>
struct FiniteNarrow<bfloat> {
  static bfloat of(float x) { return finite_bfloat(x); }
};

// Whether FiniteNarrow keeps a number but for its rounding.
template <class T>
VQ_FN bool kept_as_it_is(float x) {
  return is_finite_bits(bits_of((float)Narrow<T>::of(x)));
}

// An exact key or value as a cache of half (BFLOAT = 0) or bfloat keeps it.
template <int BFLOAT>
VQ_FN float as_kept(float x) {
  if (BFLOAT) return (float)finite_bfloat(x);
  return (float)finite_half(x);
}
// Of what is 16 bits wide already, only infinities and NaN change.
template <int BFLOAT>
VQ_FN float as_kept(half x) {
  const float y = (float)x;
  return BFLOAT || !is_finite_bits(bits_of(y)) ? as_kept<BFLOAT>(y) : y;
}
template <int BFLOAT>
VQ_FN float as_kept(bfloat x) {
  const float y = (float)x;
  return !BFLOAT || !is_finite_bits(bits_of(y)) ? as_kept<BFLOAT>(y) : y;
}

VQ_FN void barrier_of_group() { threadgroup_barrier(mem_flags::mem_threadgroup); }

// hadamard_row of n_rows rows of DIM values, by all threads: the same stages, hence the same bits.
// The rows are complete before and after (barriers inside).
template <int DIM, class Rows>
VQ_FN void hadamard_rows(Rows rows, uint n_rows, uint self, uint n_threads) {
  for (int start = 0; start < DIM;) {
    const int block = hadamard_block(DIM - start);
    const uint pairs = (uint)block / 2u;
    for (uint stride = 1; stride < (uint)block; stride *= 2) {
      barrier_of_group();
      for (uint i = self; i < n_rows * pairs; i += n_threads) {
        const uint k = i % pairs;
        Rows y = rows + (i / pairs * DIM + start + (k / stride) * 2 * stride + k % stride);
        const float a = y[0], b = y[stride];
        y[0] = a + b;
        y[stride] = a - b;
      }
    }
    barrier_of_group();
    const float scale = hadamard_scale(block);
    for (uint i = self; i < n_rows * block; i += n_threads) {
      Rows y = rows + (i / block * DIM + start + i % block);
      *y = mul(*y, scale);
    }
    start += block;
  }
  barrier_of_group();
}

}  // namespace veloxquant
