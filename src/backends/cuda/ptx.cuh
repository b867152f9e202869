// The instructions that CUDA C++ has no name for. tests/cuda_machine has the same functions for the
// host, where tests run the kernels without a GPU.
#pragma once

#include <cstdint>

namespace veloxquant::ptx {

// c += A B, 16 x 32 by 32 x 8: int8, and unsigned bytes in B.
__device__ __forceinline__ void mma_s8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                       uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_s8u8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The same, 16 x 16 by 16 x 8, of 16-bit elements.
__device__ __forceinline__ void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                        uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Element (row, 2 column + half) of an 8 x 8 matrix of 16-bit halves, a lane having those of its
// row g and columns 2i, 2i + 1 -> the transposed matrix.
__device__ __forceinline__ uint32_t transpose8(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

// The kernel after this one on the stream may set out; it waits for the end of this one itself.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// What came before on the stream is done and its writes are seen.
__device__ __forceinline__ void wait_for_stream() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A barrier, of its own, of kThreads threads.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void sync_threads() {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

// Memory that is read once: it leaves the first-level cache to what a kernel spills there.
__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 x;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(from));
  return x;
}
__device__ __forceinline__ uint2 load_once(const uint2* from) {
  uint2 x;
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(from));
  return x;
}

// Sent for here, whatever is waited for before it is used.
__device__ __forceinline__ uint4 load_now(const uint4* from) {
  uint4 x;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

// x, worked out again here rather than kept in a register, or spilled, since it was last used.
__device__ __forceinline__ int afresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// What another CTA has left, where at < n, else as given: no branch, so that many are on their way.
__device__ __forceinline__ void load_left(float2& x, const void* from, int at, int n) {
  asm volatile("{\n.reg .pred p;\nsetp.lt.s32 p, %3, %4;\n@p ld.global.cg.v2.f32 {%0,%1}, [%2];\n}"
               : "+f"(x.x), "+f"(x.y)
               : "l"(from), "r"(at), "r"(n)
               : "memory");
}
__device__ __forceinline__ void load_left(float4& x, const void* from, int at, int n) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.lt.s32 p, %5, %6;\n"
      "@p ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];\n}"
      : "+f"(x.x), "+f"(x.y), "+f"(x.z), "+f"(x.w)
      : "l"(from), "r"(at), "r"(n)
      : "memory");
}

// 128 bytes set out for the second-level cache.
__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// By a warp: `bytes` set out for the second-level cache, where it is more than none; a multiple of
// 16, as the address. By a predicate, as below.
__device__ __forceinline__ void prefetch_bulk(const void* from, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.s32 p, %2, 0;\n"
      "@p cp.async.bulk.prefetch.L2.global [%0], %1;\n}" ::"l"(from),
      "r"(bytes), "r"(bytes > 0 ? static_cast<int>(threadIdx.x & 31) : 1)
      : "memory");
#endif
}

// Bulk copies to shared memory, one at a time, each a phase of an mbarrier of 8 bytes; the
// addresses are shared memory's. By a warp; a barrier must follow. Before sm_90 `n_threads` copy.
__device__ __forceinline__ void begin_bulk_copies(uint32_t barrier, int n_threads) {
  if ((threadIdx.x & 31) != 0) return;
#if __CUDA_ARCH__ >= 900
  n_threads = 1;
#endif
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(n_threads) : "memory");
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// By all threads; thread kThreads sends for it, or before sm_90 those before it do.
template <int kThreads>
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes,
                                          uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  // By predicates: after a branch that one thread takes, warps are taken to be divided.
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.s32 p, %0, %1;\n"
      "@p mbarrier.arrive.expect_tx.shared.b64 _, [%2], %3;\n"
      "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%4], [%5], %3, [%2];"
      "\n}" ::"r"(static_cast<int>(threadIdx.x)),
      "n"(kThreads), "r"(barrier), "r"(bytes), "r"(to), "l"(from)
      : "memory");
#else
  if (threadIdx.x >= kThreads) return;
#pragma unroll 4
  for (int e = 16 * threadIdx.x; e < bytes; e += 16 * kThreads) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + e),
                 "l"(static_cast<const char*>(from) + e)
                 : "memory");
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}
// The count-th phase of an mbarrier is over: that copy is there, or all warps have arrived so
// often. By whole warps, nobody a phase behind.
__device__ __forceinline__ void wait_for_phase(uint32_t barrier, int count) {
  uint32_t there;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(there)
        : "r"(barrier), "r"((count - 1) & 1)
        : "memory");
  } while (__any_sync(0xffffffffu, there == 0));
}

// An mbarrier at which n_warps warps arrive. By a warp; a barrier must follow.
__device__ __forceinline__ void begin_arrivals(uint32_t barrier, int n_warps) {
  if ((threadIdx.x & 31) != 0) return;
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(n_warps) : "memory");
}
// The warp, where `wanted`, is there and goes on; what it has written is seen behind the end of the
// phase.
__device__ __forceinline__ void arrive_warp(uint32_t barrier, bool wanted) {
  __syncwarp();
  // By a predicate: after a branch that one thread takes, warps are taken to be divided.
  asm volatile(
      "{\n.reg .pred p;\n.reg .b64 state;\nsetp.eq.s32 p, %1, 0;\n"
      "@p mbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier),
      "r"(wanted ? static_cast<int>(threadIdx.x & 31) : 1)
      : "memory");
}

// Adds 1; what this thread knows to be written is seen by who counts after it, and the other way
// round.
__device__ __forceinline__ unsigned long long count_one(unsigned long long* counter) {
  unsigned long long before;
  asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], 1;"
               : "=l"(before)
               : "l"(counter)
               : "memory");
  return before;
}
// Where `wanted`: a word without the mark, outside of `low` bits, becomes the mark. By predicates,
// as above.
__device__ __forceinline__ void mark(unsigned long long* word, bool wanted, uint64_t mark,
                                     uint64_t low) {
  asm volatile(
      "{\n.reg .pred p, q;\n.reg .b64 x, y;\nsetp.ne.s32 p, %1, 0;\n"
      "mov.b64 x, %2;\n@p ld.global.cg.b64 x, [%0];\nand.b64 y, x, %3;\nsetp.ne.u64 q, y, %2;\n"
      "@q atom.global.cas.b64 y, [%0], x, %2;\n}" ::"l"(word),
      "r"(static_cast<int>(wanted)), "l"(mark), "l"(~low)
      : "memory");
}

}  // namespace veloxquant::ptx
