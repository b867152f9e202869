// One step, 32 tokens: codes -> scores, probabilities -> output, on tensor cores.
//
// A lane (g = lane / 4, i = lane % 4) has, of HEADS query heads padded to 4 or 8:
//   scores, probabilities   of tokens 16 t + 2g + u, number 2t + u (u: rows g and g + 8 of tile t);
//                           HEADS 4: head i, HEADS 8: heads 2i + e, number 4e + 2t + u
//   output                  rows: dimensions of sub-vector 8r + g, columns 2i, 2i + 1
// The columns of both products are the same: HEADS 4: column 2 head + term, where a query and a
// probability are a high and a low term; HEADS 8: a head a column, one product for each term. So
// the terms of a sum meet in a lane, and what is known of a head (scale, reference) stays where it
// is. Between the products 8 x 8 transpositions bring the tokens from rows to where operand B has
// them.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "src/backends/cuda/ptx.cuh"

namespace veloxquant::attention::cuda {

using ptx::exp2_fast;
using ptx::mma_f16;
using ptx::mma_s8;
using ptx::mma_s8u8;
using ptx::transpose8;

// What a code becomes: 4 int8 or 2 fp16, one operand register.
enum Kind : int { kInt8, kHalf2 };

// Tables of one head in shared memory. by_lane: rows of 256 bytes, one a code, the keys' entry of
// each lane and then the values'; a lane's entries so lie in its own bank, and one dot
// product makes the address, 256 code + lane's place. by_subvector: [m][code].
template <bool kByLane>
struct Tables {
  uint32_t lane_bytes;  // an address in shared memory, so that the product is all of one

  // `place`: the lane's own sub-vector among those of a chunk.
  __device__ __forceinline__ Tables(const char* base, int lane, int place)
      : lane_bytes(static_cast<uint32_t>(__cvta_generic_to_shared(base)) +
                   (kByLane ? 4 * lane : 1024 * place)) {}

  // The entry of byte kByte of `codes`; `subvector` counts from the lane's place.
  template <int kByte>
  __device__ __forceinline__ uint32_t look(uint32_t codes, int subvector) const {
    if constexpr (kByLane) {
      // Not a byte permutation: those, of which the values' transpositions are made, have another
      // pipe, and each does an instruction in two cycles.
      constexpr uint32_t kWeight = kByte % 2 == 0 ? 256u : 256u << 16;
      const uint32_t offset =
          kByte < 2 ? __dp2a_lo(kWeight, codes, lane_bytes) : __dp2a_hi(kWeight, codes, lane_bytes);
      return at(offset);
    } else {
      // 4 * code + lane's table, in one dot product of bytes.
      const uint32_t offset = __dp4a(codes, 4u << (8 * kByte), lane_bytes);
      return at(offset + subvector * 1024);
    }
  }

 private:
  __device__ __forceinline__ static uint32_t at(uint32_t address) {
    return *static_cast<const uint32_t*>(__cvta_shared_to_generic(address));
  }
};

// Operand B of the scores: the queries, as a high and a low term, 16 bits or more together.
template <Kind kKind, int HEADS, int CHUNKS>
struct Query {
  static constexpr int kTerms = HEADS == 8 ? 2 : 1;
  uint32_t b[kTerms][CHUNKS][2];

  // rows: [2 terms][HEADS][row_bytes]
  __device__ __forceinline__ void load(const uint8_t* rows, int row_bytes, int lane) {
    const int g = lane >> 2, i = lane & 3;
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
      const int term = HEADS == 4 ? g & 1 : t, head = HEADS == 4 ? g >> 1 : g;
      const uint8_t* row = rows + (term * HEADS + head) * row_bytes + i * 4;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
        for (int k = 0; k < 2; ++k)
          b[t][c][k] = *reinterpret_cast<const uint32_t*>(row + c * 32 + k * 16);
      }
    }
  }
};

// The scores of one step as the products leave them.
template <Kind kKind, int HEADS>
struct Scores {
  using Element = std::conditional_t<kKind == kInt8, int, float>;
  static constexpr int kTerms = HEADS == 8 ? 2 : 1, kCount = HEADS;
  Element c[kTerms][2][4];

  template <int CHUNKS, class TableType>
  __device__ __forceinline__ void make(const uint32_t (&words)[2 * CHUNKS], const TableType& tables,
                                       const Query<kKind, HEADS, CHUNKS>& query) {
#pragma unroll
    for (int n = 0; n < kTerms * 8; ++n) c[n / 8][n / 4 % 2][n % 4] = 0;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const uint32_t word = words[t * CHUNKS + chunk];
        const uint32_t a0 = tables.template look<0>(word, chunk * 8),
                       a1 = tables.template look<1>(word, chunk * 8),
                       a2 = tables.template look<2>(word, chunk * 8 + 4),
                       a3 = tables.template look<3>(word, chunk * 8 + 4);
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
          const uint32_t(&b)[2] = query.b[term][chunk];
          if constexpr (kKind == kInt8) {
            mma_s8(c[term][t], a0, a1, a2, a3, b[0], b[1]);
          } else {
            mma_f16(c[term][t], a0, a1, a2, a3, b[0], b[1]);
          }
        }
      }
    }
  }

  // In units of the query's scale.
  __device__ __forceinline__ void join(float (&s)[kCount]) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int e = n / 4, t = n / 2 % 2, u = n % 2;
      const Element high = HEADS == 4 ? c[0][t][2 * u] : c[0][t][2 * u + e];
      const Element low = HEADS == 4 ? c[0][t][2 * u + 1] : c[kTerms - 1][t][2 * u + e];
      if constexpr (kKind == kInt8) {
        s[n] = __int2float_rn(high * 256 + low);
      } else {
        s[n] = high + low;
      }
    }
  }
};

// e[token] = 4 dimensions -> e[dimension] = 4 tokens
__device__ __forceinline__ void transpose4(uint32_t (&e)[4]) {
  const uint32_t a = __byte_perm(e[0], e[1], 0x5140), b = __byte_perm(e[0], e[1], 0x7362);
  const uint32_t c = __byte_perm(e[2], e[3], 0x5140), d = __byte_perm(e[2], e[3], 0x7362);
  e[0] = __byte_perm(a, c, 0x5410);
  e[1] = __byte_perm(a, c, 0x7632);
  e[2] = __byte_perm(b, d, 0x5410);
  e[3] = __byte_perm(b, d, 0x7632);
}

// The running output of a warp.
//
// int8 entries: probabilities are 16-bit integers, 2^kProbabilityBits or less, as two bytes, the
// terms. HEADS 4: columns 2 head + term. HEADS 8: two sets of accumulators. half entries:
// probabilities in fp16, one term; HEADS 4: columns 2 head, the others stay 0.
template <Kind kKind, int HEADS, int CHUNKS>
struct Output {
  static constexpr bool kHalf = kKind != kInt8;
  using Element = std::conditional_t<kHalf, float, int>;
  static constexpr int kTerms = !kHalf && HEADS == 8 ? 2 : 1;
  static constexpr int kRows = kKind == kHalf2 ? 1 : 2;  // products of 16 rows for 8 sub-vectors
  // A score may exceed the reference by so much before the sums must be rescaled.
  static constexpr float kHeadroom = kHalf ? 15.0f : 0.0f;
  static constexpr float kProbabilityBits =
      kHalf ? 0.0f : 15.998f;  // under 16 by a margin for rounding

  Element acc[kTerms][CHUNKS][kRows][4];
  Element sum[kTerms][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sum[t][k] = 0;
#pragma unroll
        for (int r = 0; r < CHUNKS; ++r) {
#pragma unroll
          for (int x = 0; x < kRows; ++x) acc[t][r][x][k] = 0;
        }
      }
    }
  }

  // Operand B from probabilities: b[term][half] for int8, b[half][0..1] for fp16.
  __device__ __forceinline__ void pack(const float (&p)[HEADS], uint32_t (&b)[2][2]) const {
    if constexpr (kHalf) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const __half2 pair = __floats2half2_rn(p[n], HEADS == 8 ? p[HEADS - 4 + n] : 0.0f);
        b[n / 2][n % 2] = transpose8(*reinterpret_cast<const uint32_t*>(&pair));
      }
    } else {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        uint32_t terms[HEADS / 4];  // of head e: high and high, low and low of two tokens
#pragma unroll
        for (int e = 0; e < HEADS / 4; ++e) {
          // Adding 2^23 leaves the rounded integer in the low bits of the float.
          const uint32_t x = __float_as_uint(p[4 * e + 2 * t] + 8388608.0f),
                         y = __float_as_uint(p[4 * e + 2 * t + 1] + 8388608.0f);
          terms[e] = __byte_perm(x, y, 0x4051);
        }
        if constexpr (HEADS == 4) {
          b[0][t] = transpose8(terms[0]);
        } else {
          b[0][t] = transpose8(__byte_perm(terms[0], terms[1], 0x5410));
          b[1][t] = transpose8(__byte_perm(terms[0], terms[1], 0x7632));
        }
      }
    }
  }

  template <class TableType>
  __device__ __forceinline__ void step(const uint32_t (&words)[2 * CHUNKS], const TableType& tables,
                                       const uint32_t (&b)[2][2]) {
    if constexpr (kHalf) {
      constexpr uint32_t kOnes = 0x3c003c00u;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        mma_f16(sum[0], kOnes, kOnes, kOnes, kOnes, b[h][0], b[h][1]);
#pragma unroll
        for (int r = 0; r < CHUNKS; ++r) {
          const uint32_t word = words[h * CHUNKS + r];
          const uint32_t e0 = tables.template look<0>(word, r * 8),
                         e1 = tables.template look<1>(word, r * 8);
          const uint32_t e2 = tables.template look<2>(word, r * 8),
                         e3 = tables.template look<3>(word, r * 8);
          // Register u of operand B has the tokens of number 2h + u.
          mma_f16(acc[0][r][0], __byte_perm(e0, e2, 0x5410), __byte_perm(e0, e2, 0x7632),
                  __byte_perm(e1, e3, 0x5410), __byte_perm(e1, e3, 0x7632), b[h][0], b[h][1]);
        }
      }
    } else {
      constexpr uint32_t kOnes = 0x01010101u;
#pragma unroll
      for (int t = 0; t < kTerms; ++t)
        mma_s8u8(sum[t], kOnes, kOnes, kOnes, kOnes, b[t][0], b[t][1]);
#pragma unroll
      for (int r = 0; r < CHUNKS; ++r) {
        uint32_t e[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t word = words[h * CHUNKS + r];
          e[h][0] = tables.template look<0>(word, r * 8);
          e[h][1] = tables.template look<1>(word, r * 8);
          e[h][2] = tables.template look<2>(word, r * 8);
          e[h][3] = tables.template look<3>(word, r * 8);
          transpose4(e[h]);
        }
#pragma unroll
        for (int t = 0; t < kTerms; ++t) {
          mma_s8u8(acc[t][r][0], e[0][0], e[0][1], e[1][0], e[1][1], b[t][0], b[t][1]);
          mma_s8u8(acc[t][r][1], e[0][2], e[0][3], e[1][2], e[1][3], b[t][0], b[t][1]);
        }
      }
    }
  }

  // Some integer of the warp has passed 2^30.
  __device__ __forceinline__ bool large() const {
    int top = 0;
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        top = max(top, sum[t][k]);
#pragma unroll
        for (int r = 0; r < CHUNKS; ++r) {
#pragma unroll
          for (int x = 0; x < kRows; ++x) top = max(top, abs(static_cast<int>(acc[t][r][x][k])));
        }
      }
    }
    return __any_sync(0xffffffffu, top > (1 << 30));
  }

  // The references of the lane's heads rose by delta[e]: scale the sums down.
  __device__ __forceinline__ void lower(const float (&delta)[HEADS / 4]) {
    if constexpr (kHalf) {
      float factor[HEADS / 4];
#pragma unroll
      for (int e = 0; e < HEADS / 4; ++e) factor[e] = exp2_fast(-delta[e]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float by = factor[HEADS == 4 ? 0 : k & 1];
        sum[0][k] *= by;
#pragma unroll
        for (int r = 0; r < CHUNKS; ++r) {
#pragma unroll
          for (int x = 0; x < kRows; ++x) acc[0][r][x][k] *= by;
        }
      }
    } else {
      // Past 22 bits nothing that counts is left of the old sums.
      int shift[HEADS / 4];
#pragma unroll
      for (int e = 0; e < HEADS / 4; ++e)
        shift[e] = delta[e] > 22.5f ? 31 : __float2int_rn(delta[e]);
      shift_all(sum[0], sum[kTerms - 1], shift);
#pragma unroll
      for (int r = 0; r < CHUNKS; ++r) {
#pragma unroll
        for (int x = 0; x < kRows; ++x) shift_all(acc[0][r][x], acc[kTerms - 1][r][x], shift);
      }
    }
  }

  // Writes out[head][D] and sums[head * stride]. Entries beyond D (padding) are left out.
  __device__ __forceinline__ void write(float* out, float* sums, int stride, int head_dim,
                                        int lane) const {
    const int g = lane >> 2, i = lane & 3;
#pragma unroll
    for (int e = 0; e < HEADS / 4; ++e) {
      const int head = HEADS / 4 * i + e;
      if (g == 0) sums[head * stride] = joined(sum[0], sum[kTerms - 1], 0, e);
#pragma unroll
      for (int r = 0; r < CHUNKS; ++r) {
        const int d = (r * 8 + g) * 2 * kRows;  // and those after it, whole sub-vectors
        if (d >= head_dim) continue;
        float y[2 * kRows];
#pragma unroll
        for (int x = 0; x < 2 * kRows; ++x)
          y[x] = joined(acc[0][r][x / 2], acc[kTerms - 1][r][x / 2], x % 2, e);
        float* to = out + head * head_dim + d;
        if constexpr (kRows == 1) {
          *reinterpret_cast<float2*>(to) = make_float2(y[0], y[1]);
        } else {
          *reinterpret_cast<float4*>(to) = make_float4(y[0], y[1], y[2], y[3]);
        }
      }
    }
  }

 private:
  // (256 high + low) >> shift, where the bits that leave the high term go on into the low one.
  __device__ __forceinline__ static void shift_terms(Element& high, Element& low, int shift) {
    if constexpr (!kHalf) {
      const int rest = (high & ((1u << shift) - 1)) << 8;
      low = shift == 31 ? 0 : (low + rest) >> shift;
      high = shift == 31 ? 0 : high >> shift;
    }
  }
  // first, second: the accumulators of the terms (HEADS 8), or the same ones (HEADS 4).
  __device__ __forceinline__ static void shift_all(Element (&first)[4], Element (&second)[4],
                                                   const int (&shift)[HEADS / 4]) {
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      if constexpr (HEADS == 4) {
        shift_terms(first[2 * y], first[2 * y + 1], shift[0]);
      } else {
        shift_terms(first[2 * y], second[2 * y], shift[0]);
        shift_terms(first[2 * y + 1], second[2 * y + 1], shift[HEADS / 4 - 1]);
      }
    }
  }

  // Row y (of g and g + 8) of the lane's head e as one number.
  __device__ __forceinline__ static float joined(const Element (&first)[4],
                                                 const Element (&second)[4], int y, int e) {
    if constexpr (kHalf) return first[2 * y + e];
    const Element high = first[2 * y + e], low = HEADS == 4 ? first[2 * y + 1] : second[2 * y + e];
    return 256.0f * static_cast<float>(high) + static_cast<float>(low);
  }
};

}  // namespace veloxquant::attention::cuda
