// The names that CUDA C++ has without a header, for the host: what the kernels under test use.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "tests/cuda_machine/machine.h"

// CUDA's own headers leave the qualifiers to the host's compiler.
#undef __device__
#undef __global__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __maxnreg__
#undef __align__
#undef __grid_constant__
#define __device__
#define __global__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __maxnreg__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define threadIdx cuda_machine::machine().thread
#define blockIdx cuda_machine::machine().block
#define gridDim cuda_machine::machine().grid

namespace cuda_machine {

inline int lane() { return static_cast<int>(machine().thread.x % kLanes); }

template <class T>
Machine::Words all_of(T x) {
  const uint32_t word = std::bit_cast<uint32_t>(x);
  return machine().meet(&word, 1);
}
// Of a global address: others may run before it is there.
template <class T>
T load(const T* from) {
  machine().yield();
  return *from;
}

}  // namespace cuda_machine

using std::max;
using std::min;
inline int min(int a, unsigned b) { return std::min(a, static_cast<int>(b)); }

inline void __syncthreads() { cuda_machine::machine().sync_all(); }
inline int __syncthreads_or(int x) { return cuda_machine::machine().sync_all_or(x != 0); }
inline void __syncwarp() { cuda_machine::all_of(0); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(uint32_t, T x, int from) {
  return std::bit_cast<T>(cuda_machine::all_of(x)[from % 32][0]);
}
template <class T>
T __shfl_xor_sync(uint32_t, T x, int by) {
  return std::bit_cast<T>(cuda_machine::all_of(x)[cuda_machine::lane() ^ by][0]);
}
template <class T>
T __shfl_up_sync(uint32_t, T x, int by) {
  const auto all = cuda_machine::all_of(x);
  const int lane = cuda_machine::lane();
  return std::bit_cast<T>(all[lane >= by ? lane - by : lane][0]);
}
inline uint32_t __ballot_sync(uint32_t, bool x) {
  const auto all = cuda_machine::all_of(static_cast<int>(x));
  uint32_t bits = 0;
  for (int l = 0; l < 32; ++l) bits |= all[l][0] << l;
  return bits;
}
inline bool __any_sync(uint32_t mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline int __reduce_max_sync(uint32_t, int x) {
  const auto all = cuda_machine::all_of(x);
  int most = std::numeric_limits<int>::min();
  for (int l = 0; l < 32; ++l) most = std::max(most, static_cast<int>(all[l][0]));
  return most;
}
inline int __reduce_min_sync(uint32_t mask, int x) { return -__reduce_max_sync(mask, -x); }

#define __ldg cuda_machine::load
#define __ldcg cuda_machine::load
#define __ldcs cuda_machine::load
template <class T, class U>
void __stcg(T* to, U x) {
  *to = x;
}
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long x) {
  cuda_machine::machine().yield();
  const unsigned long long before = *at;
  *at += x;
  return before;
}
inline unsigned long long atomicCAS(unsigned long long* at, unsigned long long expected,
                                    unsigned long long x) {
  cuda_machine::machine().yield();
  const unsigned long long before = *at;
  if (before == expected) *at = x;
  return before;
}

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const int from = 8 * ((selectors >> (4 * k)) & 7);
    result |= static_cast<uint32_t>((bytes >> from) & 255) << (8 * k);
  }
  return result;
}
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t c) {
  for (int k = 0; k < 4; ++k) c += ((a >> (8 * k)) & 255) * ((b >> (8 * k)) & 255);
  return c;
}
inline uint32_t __dp2a_lo(uint32_t a, uint32_t b, uint32_t c) {
  return c + (a & 0xffff) * (b & 255) + (a >> 16) * ((b >> 8) & 255);
}
inline uint32_t __dp2a_hi(uint32_t a, uint32_t b, uint32_t c) { return __dp2a_lo(a, b >> 16, c); }
inline int __ffs(uint32_t x) { return std::countr_zero(x) + 1; }  // of x != 0
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __log2f(float x) { return std::log2(x); }

// Shared memory counts addresses from its beginning.
inline size_t __cvta_generic_to_shared(const void* at) {
  return static_cast<const char*>(at) - cuda_machine::machine().shared();
}
inline void* __cvta_shared_to_generic(size_t address) {
  return cuda_machine::machine().shared() + address;
}
