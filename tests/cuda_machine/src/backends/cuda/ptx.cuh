// src/backends/cuda/ptx.cuh for the host: what each instruction computes, by its definition.
#pragma once

#include "tests/cuda_machine/intrinsics.h"

namespace veloxquant::ptx {

namespace host {

// Rows g, g + 8 of A and columns 2i, 2i + 1 of B of the lane's elements of c, K of 32 bytes a row:
// element(word, k) is the k-th of a word.
template <int kElements, class T, class Sum, class A, class B>
void multiply(T (&c)[4], const uint32_t (&words)[6], const A& of_a, const B& of_b) {
  const auto all = cuda_machine::machine().meet(words, 6);
  const int g = cuda_machine::lane() / 4, i = cuda_machine::lane() % 4;
  for (int row = 0; row < 2; ++row) {
    for (int column = 0; column < 2; ++column) {
      Sum sum = c[2 * row + column];
      for (int half = 0; half < 2; ++half) {
        for (int quarter = 0; quarter < 4; ++quarter) {
          const uint32_t a = all[4 * g + quarter][2 * half + row];
          const uint32_t b = all[4 * (2 * i + column) + quarter][4 + half];
          for (int k = 0; k < kElements; ++k) sum += static_cast<Sum>(of_a(a, k)) * of_b(b, k);
        }
      }
      c[2 * row + column] = static_cast<T>(sum);
    }
  }
}

inline int signed_byte(uint32_t word, int k) { return static_cast<int8_t>(word >> (8 * k)); }
inline int byte(uint32_t word, int k) { return static_cast<uint8_t>(word >> (8 * k)); }
inline float half(uint32_t word, int k) {
  return __half2float(std::bit_cast<__half>(static_cast<uint16_t>(word >> (16 * k))));
}
inline float bfloat(uint32_t word, int k) {
  return std::bit_cast<float>(k == 0 ? word << 16 : word & 0xffff0000u);
}

}  // namespace host

inline void mma_s8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                   uint32_t b1) {
  host::multiply<4, int, int>(c, {a0, a1, a2, a3, b0, b1}, host::signed_byte, host::signed_byte);
}
inline void mma_s8u8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1) {
  host::multiply<4, int, int>(c, {a0, a1, a2, a3, b0, b1}, host::signed_byte, host::byte);
}
inline void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                    uint32_t b1) {
  host::multiply<2, float, double>(c, {a0, a1, a2, a3, b0, b1}, host::half, host::half);
}
inline void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1) {
  host::multiply<2, float, double>(c, {a0, a1, a2, a3, b0, b1}, host::bfloat, host::bfloat);
}

inline uint32_t transpose8(uint32_t x) {
  const auto all = cuda_machine::all_of(x);
  const int g = cuda_machine::lane() / 4, i = cuda_machine::lane() % 4;
  const auto element = [&](int row, int column) {
    return (all[4 * row + column / 2][0] >> (16 * (column % 2))) & 0xffffu;
  };
  return element(2 * i, g) | element(2 * i + 1, g) << 16;
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }

inline void let_next_start() {}
inline void wait_for_stream() { cuda_machine::machine().yield(); }

template <int kBarrier, int kThreads>
void sync_threads() {
  cuda_machine::machine().sync(kBarrier, kThreads);
}

inline uint4 load_once(const uint4* from) { return *from; }
inline uint2 load_once(const uint2* from) { return *from; }
inline uint4 load_now(const uint4* from) { return *from; }
inline int afresh(int x) { return x; }
template <class V>
void load_left(V& x, const void* from, int at, int n) {
  if (at < n) x = *static_cast<const V*>(from);
}
inline void prefetch(const void*) {}
inline void prefetch_bulk(const void*, int) {}

// The word at `barrier` is the number of phases that are over and, in its upper half, of warps that
// have arrived since and that are to arrive. A copy arrives as late as it may.
inline uint32_t* phases(uint32_t barrier) {
  return static_cast<uint32_t*>(__cvta_shared_to_generic(barrier));
}
inline void begin_bulk_copies(uint32_t barrier, int) { *phases(barrier) = 0; }
template <int kThreads>
void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  if (cuda_machine::machine().thread.x != kThreads) return;
  cuda_machine::machine().copy_for_all([=] {
    std::memcpy(__cvta_shared_to_generic(to), from, bytes);
    ++*phases(barrier);
  });
}
inline void wait_for_phase(uint32_t barrier, int count) {
  while (*phases(barrier) < static_cast<uint32_t>(count)) cuda_machine::machine().yield();
  __syncwarp();
}
inline void begin_arrivals(uint32_t barrier, int n_warps) {
  phases(barrier)[0] = 0;
  phases(barrier)[1] = n_warps << 16;
}
inline void arrive_warp(uint32_t barrier, bool wanted) {
  __syncwarp();
  if (!wanted || threadIdx.x % 32 != 0) return;
  uint32_t& arrived = phases(barrier)[1];
  ++arrived;
  if ((arrived & 0xffff) < arrived >> 16) return;
  arrived &= 0xffff0000u;
  ++*phases(barrier);
}

inline unsigned long long count_one(unsigned long long* counter) { return atomicAdd(counter, 1); }
inline void mark(unsigned long long* word, bool wanted, uint64_t mark, uint64_t low) {
  cuda_machine::machine().yield();
  if (wanted && (*word & ~low) != mark) *word = mark;
}

}  // namespace veloxquant::ptx
