// The exact tokens of a pair, in the original coordinates, on tensor cores: 16 tokens a warp and
// turn.
//
// Operands come straight from the 16-bit rows by 16-byte loads; which dimension stands at which
// place of the inner product is free, so a lane takes 8 neighbouring ones. Always 8 query heads,
// rows g their high terms and rows g + 8 their low ones, as prepared by the query kernel.
#pragma once

#include "src/attention/cuda_parts.cuh"

namespace veloxquant::attention::cuda {

template <bool kBf16>
__device__ __forceinline__ void mma_16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                       uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (kBf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    mma_f16(c, a0, a1, a2, a3, b0, b1);
  }
}

template <bool kBf16>
__device__ __forceinline__ uint32_t pack_16(float a, float b) {
  if constexpr (kBf16) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&x);
  } else {
    const __half2 x = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&x);
  }
}
template <bool kBf16>
__device__ __forceinline__ float2 unpack_16(uint32_t x) {
  if constexpr (kBf16)
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
  return __half22float2(*reinterpret_cast<const __half2*>(&x));
}

// 8 dimensions of a row from `d` on, zero beyond head_dim.
__device__ __forceinline__ uint4 load_dims(const uint16_t* row, int d, int head_dim) {
  if (d >= head_dim) return make_uint4(0, 0, 0, 0);
  return __ldg(reinterpret_cast<const uint4*>(row + d));
}

template <bool kBf16, int HEADS, int DIM, int WARPS>
__device__ __forceinline__ void attend_exact_as(const DecodeParams& p, const Pair& pair,
                                                int n_tokens, bool wait,
                                                const MergeSpace<HEADS, WARPS>& space) {
  constexpr int kKeyPieces = DIM / 32, kValuePieces = (DIM + 63) / 64;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, i = lane & 3;
  const uint16_t* keys = p.exact_keys.data + pair.sequence * p.exact_keys.batch_stride +
                         pair.kv_head * p.exact_keys.head_stride;
  const uint16_t* values = p.exact_values.data + pair.sequence * p.exact_values.batch_stride +
                           pair.kv_head * p.exact_values.head_stride;
  // [2 terms][8 heads][DIM], then 8 scales.
  const uint8_t* prepared =
      p.workspace + p.exact_query_at + static_cast<int64_t>(pair.index) * (32 * DIM + 32);
  float acc[kValuePieces][4][4] = {};
  float top = kNothing, sum = 0.0f;
#pragma unroll 1
  for (int first = 16 * warp; first < n_tokens; first += 16 * WARPS) {
    uint4 k[2][kKeyPieces], v[kValuePieces][4];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int token = min(first + 8 * tile + g, n_tokens - 1);
#pragma unroll
      for (int q = 0; q < kKeyPieces; ++q) {
        k[tile][q] =
            load_dims(keys + token * p.exact_keys.token_stride, 32 * q + 8 * i, p.head_dim);
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token = min(first + 2 * i + (j & 1) + 8 * (j >> 1), n_tokens - 1);
#pragma unroll
      for (int q = 0; q < kValuePieces; ++q) {
        v[q][j] =
            load_dims(values + token * p.exact_values.token_stride, 64 * q + 8 * g, p.head_dim);
      }
    }
    // The tokens are under way while the kernel ahead still prepares the queries.
    if (wait) wait_for_queries();
    wait = false;
    const float scale = __ldcg(reinterpret_cast<const float*>(prepared + 32 * DIM) + g);
    float c[2][4] = {};
#pragma unroll
    for (int q = 0; q < kKeyPieces; ++q) {
      const uint4 high =
          __ldcg(reinterpret_cast<const uint4*>(prepared + 2 * (g * DIM + 32 * q + 8 * i)));
      const uint4 low =
          __ldcg(reinterpret_cast<const uint4*>(prepared + 2 * ((8 + g) * DIM + 32 * q + 8 * i)));
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        mma_16<kBf16>(c[tile], high.x, low.x, high.y, low.y, k[tile][q].x, k[tile][q].y);
        mma_16<kBf16>(c[tile], high.z, low.z, high.w, low.w, k[tile][q].z, k[tile][q].w);
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
    uint32_t b[2] = {pack_16<kBf16>(probability[0], probability[1]),
                     pack_16<kBf16>(probability[2], probability[3])};
    uint32_t rest[2] = {0, 0};
    if constexpr (kBf16) {
      // bf16 has 8 bits: a second term carries the rest.
      const float2 x = unpack_16<kBf16>(b[0]), y = unpack_16<kBf16>(b[1]);
      rest[0] = pack_16<kBf16>(probability[0] - x.x, probability[1] - x.y);
      rest[1] = pack_16<kBf16>(probability[2] - y.x, probability[3] - y.y);
    }
#pragma unroll
    for (int q = 0; q < kValuePieces; ++q) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        uint32_t e[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          e[j] = w == 0 ? v[q][j].x : w == 1 ? v[q][j].y : w == 2 ? v[q][j].z : v[q][j].w;
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
  }
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
#pragma unroll
  for (int q = 0; q < kValuePieces; ++q) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int head = 2 * i + (k & 1), d = 64 * q + 8 * g + 2 * w + (k >> 1);
        if (head < HEADS && d < p.head_dim)
          space.warps[(warp * HEADS + head) * p.head_dim + d] = acc[q][w][k];
      }
    }
  }
  if (i == 0 && g < HEADS) {
    space.maximum[warp * HEADS + g] = top;
    space.sum[warp * HEADS + g] = sum;
  }
}

template <int HEADS, int DIM, int WARPS>
__device__ __forceinline__ void attend_exact(const DecodeParams& p, const Pair& pair, int n_tokens,
                                             bool wait, const MergeSpace<HEADS, WARPS>& space,
                                             float* to) {
  if (p.exact_bf16) {
    attend_exact_as<true, HEADS, DIM, WARPS>(p, pair, n_tokens, wait, space);
  } else {
    attend_exact_as<false, HEADS, DIM, WARPS>(p, pair, n_tokens, wait, space);
  }
  merge_warps(space, p.head_dim, 1.0f, to);
}

}  // namespace veloxquant::attention::cuda
