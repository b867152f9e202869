// The tables of a head on their way to shared memory.
#pragma once

#include "src/attention/cuda_shape.cuh"

namespace veloxquant::attention::cuda {

// Tables of one head, and of a sequence if each has its own, to shared memory. by_lane: keys
// [256][4], values [256][8]; thread t has rows t, t + THREADS.
template <class S>
struct TableRows {
  static constexpr int kRows = (256 + S::THREADS - 1) / S::THREADS;

  __device__ __forceinline__ static int index(const DecodeParams& p, const SideView& side,
                                              const Pair& pair) {
    return (side.n_sequences == 1 ? 0 : pair.sequence) * p.n_kv_heads + pair.kv_head;
  }
  __device__ __forceinline__ static const uint4* entries(const SideView& side, int index) {
    return reinterpret_cast<const uint4*>(side.entries + index * side.entries_stride);
  }

  // Each 16 bytes (the same entries for lanes 4g .. 4g + 3) at another place of the row, so that
  // the threads of a store meet in fewer banks.
  __device__ __forceinline__ static void store_row(int t, uint4 k, const uint4 (&v)[2],
                                                   char* tables) {
    uint4* row = reinterpret_cast<uint4*>(tables) + 16 * t;
    const uint32_t words[8] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y, v[1].z, v[1].w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int g = (i + t) & 7;
      row[g] = k;
    }
#pragma unroll
    for (int g = 0; g < 8; ++g) {
      // Word (g + t) mod 8, chosen by three bits of t: registers take no index.
      const uint32_t a = t & 1 ? words[(g + 1) & 7] : words[g];
      const uint32_t c = t & 1 ? words[(g + 3) & 7] : words[(g + 2) & 7];
      const uint32_t e = t & 1 ? words[(g + 5) & 7] : words[(g + 4) & 7];
      const uint32_t h = t & 1 ? words[(g + 7) & 7] : words[(g + 6) & 7];
      const uint32_t low = t & 2 ? c : a, high = t & 2 ? h : e;
      const uint32_t word = t & 4 ? high : low;
      row[8 + ((g + t) & 7)] = make_uint4(word, word, word, word);
    }
  }

  __device__ __forceinline__ static void place_scales(const DecodeParams& p, const Pair& pair,
                                                      const Shared<S>& shared) {
    const int t = threadIdx.x;
    if (t < 8 * S::KC)
      shared.key_scales()[t] = __ldg(p.keys.scales + index(p, p.keys, pair) * 8 * S::KC + t);
    if (t < 8 * S::VC)
      shared.value_scales()[t] = __ldg(p.values.scales + index(p, p.values, pair) * 8 * S::VC + t);
  }

  __device__ __forceinline__ static void place(const DecodeParams& p, const Pair& pair,
                                               const Shared<S>& shared) {
    const uint4* keys = entries(p.keys, index(p, p.keys, pair));
    const uint4* values = entries(p.values, index(p, p.values, pair));
    if constexpr (S::kByLane) {
      uint4 k[kRows], v[kRows][2];
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        const int t = threadIdx.x + n * S::THREADS;
        if (t >= 256) break;
        k[n] = __ldg(keys + t);
        v[n][0] = __ldg(values + 2 * t);
        v[n][1] = __ldg(values + 2 * t + 1);
      }
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        const int t = threadIdx.x + n * S::THREADS;
        if (t < 256) store_row(t, k[n], v[n], shared.tables);
      }
    } else {
      uint4* to = reinterpret_cast<uint4*>(shared.tables);
#pragma unroll 8
      for (int e = threadIdx.x; e < 512 * S::KC; e += 32 * S::WARPS) to[e] = __ldg(keys + e);
#pragma unroll 8
      for (int e = threadIdx.x; e < 512 * S::VC; e += 32 * S::WARPS)
        to[512 * S::KC + e] = __ldg(values + e);
    }
  }
};

}  // namespace veloxquant::attention::cuda
