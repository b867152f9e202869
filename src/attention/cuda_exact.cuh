// The exact tokens of a pair, in the original coordinates, on tensor cores: 16 tokens a warp and
// turn.
//
// Operands come straight from the 16-bit rows by 16-byte loads; which dimension stands at which
// place of the inner product is free, so a lane takes 8 neighbouring ones. Always 8 query heads,
// rows g their high terms and rows g + 8 their low ones.
#pragma once

#include "src/attention/cuda_cut.cuh"

namespace veloxquant::attention::cuda {

template <bool kBf16>
__device__ __forceinline__ void mma_16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                       uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (kBf16) {
    ptx::mma_bf16(c, a0, a1, a2, a3, b0, b1);
  } else {
    mma_f16(c, a0, a1, a2, a3, b0, b1);
  }
}

// 8 dimensions of a row from `d` on, zero beyond head_dim.
__device__ __forceinline__ uint4 load_dims(const uint16_t* row, int d, int head_dim) {
  if (d >= head_dim) return make_uint4(0, 0, 0, 0);
  return ptx::load_once(reinterpret_cast<const uint4*>(row + d));
}

// Rows of 16 tokens from `first` on set out for the second-level cache.
__device__ __forceinline__ void prefetch_rows(const uint16_t* rows, int64_t stride, int first,
                                              int n_tokens, int head_dim, int lane) {
  const int token = first + (lane & 15);
  if (token >= n_tokens) return;
  for (int d = 64 * (lane >> 4); d < head_dim; d += 128) ptx::prefetch(rows + token * stride + d);
}

// A warp: numbers d, d + 1 for d = 2 lane + 64 k of a row -> two rows of 16 bits, high and low
// terms. Returns what a unit stands for: a power of two that brings `top`, the largest, to [1, 2).
template <bool kBf16, class S>
__device__ __forceinline__ float split_16(const float2 (&x)[(S::DIM + 63) / 64], float top,
                                          uint32_t* high_row, uint32_t* low_row) {
  const int exponent = exponent_of(top);
  const float inverse = power_of_two(-exponent);
#pragma unroll
  for (int k = 0; k < (S::DIM + 63) / 64; ++k) {
    const int d = 2 * (threadIdx.x & 31) + 64 * k;
    if (d >= S::DIM) break;
    const float a = x[k].x * inverse, b = x[k].y * inverse;
    const uint32_t high = pack_16<kBf16>(a, b);
    const float2 taken = unpack_16<kBf16>(high);
    high_row[d / 2] = high;
    low_row[d / 2] = pack_16<kBf16>(a - taken.x, b - taken.y);
  }
  return power_of_two(exponent);
}

// A warp: a head's query, fp32 in a slot -> two rows of 16 bits in its place, high and low terms,
// for the exact tokens. Returns what a unit stands for: a power of two that brings the largest to
// [1, 2).
template <bool kBf16, class S>
__device__ __forceinline__ float pack_exact_query(float* row) {
  constexpr int kPairs = (S::DIM + 63) / 64;
  const int lane = threadIdx.x & 31;
  float2 x[kPairs];
  float top = 0.0f;
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    const int d = min(2 * lane + 64 * k, S::DIM - 2);
    x[k] = *reinterpret_cast<const float2*>(row + d);
    top = fmaxf(top, fmaxf(fabsf(x[k].x), fabsf(x[k].y)));
  }
  top = warp_largest(top);
  __syncwarp();
  auto* to = reinterpret_cast<uint32_t*>(row);
  return split_16<kBf16, S>(x, top, to, to + Slot<S>::kQueryStride / 2);
}

// Where the exact tokens of an item's share lie, and which this warp begins with: chunks slot, slot
// + the number of such warps ... fall to a warp.
template <class S>
struct ExactShare {
  const uint16_t* keys;
  const uint16_t* values;
  int first, end, turn, n_tokens, slot;  // tokens; the warp has some where first < end

  __device__ __forceinline__ ExactShare(const DecodeParams& p, const Item& item,
                                        const Deal<S>& deal) {
    n_tokens = item.n_exact;
    slot = same_in_warp(threadIdx.x >> 5) - deal.plain;
    turn = kChunkTokens * deal.exact;
    first = kChunkTokens * (item.first_chunk + slot);
    end = slot >= 0 ? min(kChunkTokens * (item.first_chunk + item.n_chunks), n_tokens) : first;
    if (first >= end) return;
    const Pair& pair = item.pair;
    keys = p.exact_keys.data + pair.sequence * p.exact_keys.batch_stride +
           pair.kv_head * p.exact_keys.head_stride;
    values = p.exact_values.data + pair.sequence * p.exact_values.batch_stride +
             pair.kv_head * p.exact_values.head_stride;
  }

  __device__ __forceinline__ void prefetch(const DecodeParams& p) const {
    const int lane = threadIdx.x & 31;
    if (first >= end) return;
    prefetch_rows(keys, p.exact_keys.token_stride, first, n_tokens, S::head_dim(p), lane);
    prefetch_rows(values, p.exact_values.token_stride, first, n_tokens, S::head_dim(p), lane);
  }
};

// A warp with a share, on its own; what it finds becomes result WARPS + slot.
template <bool kBf16, class S>
__device__ __forceinline__ void attend_exact(const DecodeParams& p, const ExactShare<S>& share,
                                             const Slot<S>& slot, const Results<S>& results) {
  constexpr int HEADS = S::HEADS, kKeyPieces = S::DIM / 32, kValuePieces = (S::DIM + 63) / 64;
  const int D = S::head_dim(p), n_tokens = share.n_tokens;
  const int lane = threadIdx.x & 31, g = lane >> 2, i = lane & 3;
  const int64_t key_stride = p.exact_keys.token_stride, value_stride = p.exact_values.token_stride;
  // Where registers allow, a turn's rows are on their way before anything is waited for.
  constexpr bool kEarly = S::DIM <= 128;
  uint4 k[2][kEarly ? kKeyPieces : 1], v[kEarly ? kValuePieces : 1][4];
  const auto key = [&](int first, int tile, int q) {
    const int token = min(first + 8 * tile + g, n_tokens - 1);
    return load_dims(share.keys + token * key_stride, 32 * q + 8 * i, D);
  };
  const auto load_values = [&](int first, int q, uint4(&to)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token = min(first + 2 * i + (j & 1) + 8 * (j >> 1), n_tokens - 1);
      to[j] = load_dims(share.values + token * value_stride, 64 * q + 8 * g, D);
    }
  };
  const auto fetch = [&](int first) {
    if constexpr (kEarly) {
#pragma unroll
      for (int n = 0; n < 2 * kKeyPieces; ++n)
        k[n / kKeyPieces][n % kKeyPieces] = key(first, n / kKeyPieces, n % kKeyPieces);
#pragma unroll
      for (int q = 0; q < kValuePieces; ++q) load_values(first, q, v[q]);
    }
  };
  fetch(share.first);
  // What columns beyond the heads hold is nobody's.
  // Operand A: a lane's 8 dimensions of every 32.
  const float* x = slot.queries() + g % HEADS * Slot<S>::kQueryStride + 4 * i;
  uint4 high[kKeyPieces], low[kKeyPieces];
#pragma unroll
  for (int q = 0; q < kKeyPieces; ++q) {
    high[q] = *reinterpret_cast<const uint4*>(x + 16 * q);
    low[q] = *reinterpret_cast<const uint4*>(x + Slot<S>::kQueryStride / 2 + 16 * q);
  }
  const float scale = slot.units()[HEADS + g % HEADS];
  float acc[kValuePieces][4][4] = {};
  float top = kNothing, sum = 0.0f;
#pragma unroll 1
  for (int first = share.first; first < share.end; first += share.turn) {
    const bool more = first + share.turn < share.end;
    if (more) {
      prefetch_rows(share.keys, key_stride, first + share.turn, share.end, D, lane);
      prefetch_rows(share.values, value_stride, first + share.turn, share.end, D, lane);
    }
    float c[2][4] = {};
#pragma unroll
    for (int q = 0; q < kKeyPieces; ++q) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const uint4 row = kEarly ? k[tile][kEarly ? q : 0] : key(first, tile, q);
        mma_16<kBf16>(c[tile], high[q].x, low[q].x, high[q].y, low[q].y, row.x, row.y);
        mma_16<kBf16>(c[tile], high[q].z, low[q].z, high[q].w, low[q].w, row.z, row.w);
      }
    }
    float s[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token = first + 2 * i + (j & 1) + 8 * (j >> 1);
      s[j] = (c[j >> 1][j & 1] + c[j >> 1][2 + (j & 1)]) * scale;
      if (token >= n_tokens) s[j] = -INFINITY;
    }
    float next = fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3]));
    next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 1));
    next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 2));
    next = fmaxf(next, top);
    const float keep = exp2_fast(top - next);
    top = next;
    float probability[4];
    sum *= keep;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      probability[j] = exp2_fast(s[j] - top);
      sum += probability[j];
    }
    // Columns of the output are heads 2i, 2i + 1.
    const float keep0 = __shfl_sync(0xffffffffu, keep, 8 * i),
                keep1 = __shfl_sync(0xffffffffu, keep, 8 * i + 4);
    const uint32_t b[2] = {pack_16<kBf16>(probability[0], probability[1]),
                           pack_16<kBf16>(probability[2], probability[3])};
    uint32_t rest[2] = {0, 0};
    if constexpr (kBf16) {
      // bf16 has 8 bits: a second term carries the rest.
      const float2 y = unpack_16<kBf16>(b[0]), z = unpack_16<kBf16>(b[1]);
      rest[0] = pack_16<kBf16>(probability[0] - y.x, probability[1] - y.y);
      rest[1] = pack_16<kBf16>(probability[2] - z.x, probability[3] - z.y);
    }
#pragma unroll
    for (int q = 0; q < kValuePieces; ++q) {
      uint4(&piece)[4] = v[kEarly ? q : 0];
      if constexpr (!kEarly) load_values(first, q, piece);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        uint32_t e[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          e[j] = w == 0 ? piece[j].x : w == 1 ? piece[j].y : w == 2 ? piece[j].z : piece[j].w;
        float(&to)[4] = acc[q][w];
        to[0] *= keep0;
        to[1] *= keep1;
        to[2] *= keep0;
        to[3] *= keep1;
        const uint32_t a0 = __byte_perm(e[0], e[1], 0x5410), a1 = __byte_perm(e[0], e[1], 0x7632);
        const uint32_t a2 = __byte_perm(e[2], e[3], 0x5410), a3 = __byte_perm(e[2], e[3], 0x7632);
        mma_16<kBf16>(to, a0, a1, a2, a3, b[0], b[1]);
        if constexpr (kBf16) mma_16<kBf16>(to, a0, a1, a2, a3, rest[0], rest[1]);
      }
    }
    if (more) fetch(first + share.turn);
  }
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  const int result = S::WARPS + share.slot;
#pragma unroll
  for (int q = 0; q < kValuePieces; ++q) {
    for (int k = 0; k < 2; ++k) {
      const int head = 2 * i + k, d = 64 * q + 8 * g;
      if (head >= HEADS || d >= D) continue;
      auto* to = reinterpret_cast<float4*>(results.rows + (result * HEADS + head) * D + d);
#pragma unroll
      for (int w = 0; w < 4; w += 2)
        to[w / 2] =
            make_float4(acc[q][w][k], acc[q][w][2 + k], acc[q][w + 1][k], acc[q][w + 1][2 + k]);
    }
  }
  if (i == 0 && g < HEADS) {
    results.tops[g * kWeights + result] = top;
    results.sums[g * kWeights + result] = sum;
  }
}

}  // namespace veloxquant::attention::cuda
