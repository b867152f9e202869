// One step, 32 tokens: codes -> scores, probabilities -> output, on tensor cores.
//
// A lane's registers (g = lane / 4, i = lane % 4), HEADS query heads padded to 4 or 8:
//   scores s[j]   HEADS 8: head g, token 4i + j (j < 4) and 16 + 4i + j - 4
//                 HEADS 4: head g % 4, token 16 (g / 4) + 4i + j: no lane computes an exponential
//                 twice
//   output        rows: dimensions of sub-vector 8r + g, columns 2i, 2i + 1
// The product of scores (queries x dimensions . dimensions x tokens) leaves them in the very lanes
// that hold them as operand of the second (dimensions x tokens . tokens x heads): no shuffles.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace veloxquant::attention::cuda {

// What a code becomes: 4 int8 or 2 fp16, one operand register.
enum Kind : int { kInt8, kHalf2 };

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
__device__ __forceinline__ void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                        uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

// Tables of one head in shared memory. by_lane: rows of 256 bytes, one a code, the keys' entry of
// each lane and then the values'; a lane's entries so lie in its own bank, and one byte permutation
// makes the address, code << 8 | lane's place. by_subvector: [m][code].
template <bool kByLane>
struct Tables {
  const char* base;
  uint32_t lane_bytes;

  // `place`: the lane's own sub-vector among those of a chunk.
  __device__ __forceinline__ Tables(const char* base, int lane, int place)
      : base(base), lane_bytes(kByLane ? 4 * lane : 1024 * place) {}

  // The entry of byte kByte of `codes`; `subvector` counts from the lane's place.
  template <int kByte>
  __device__ __forceinline__ uint32_t look(uint32_t codes, int subvector) const {
    if constexpr (kByLane) {
      const uint32_t offset = __byte_perm(codes, lane_bytes, 0x7604 | (kByte << 4));
      return *reinterpret_cast<const uint32_t*>(base + offset);
    } else {
      // 4 * code + lane's table, in one dot product of bytes.
      const uint32_t offset = __dp4a(codes, 4u << (8 * kByte), lane_bytes);
      return *reinterpret_cast<const uint32_t*>(base + subvector * 1024 + offset);
    }
  }
};

// Operand A of the scores: the queries, as a high and a low term, 16 bits or more together.
//
// HEADS 8: rows g: high terms of the heads, rows g + 8: low terms. HEADS 4: the high terms are rows
// 0..3 and the low ones rows 4..7, or these plus 8; a product takes the former for tokens of half 0
// and the latter for half 1, the other rows being zero: half the registers, and no score is
// computed twice.
template <Kind kKind, int HEADS, int CHUNKS>
struct Query {
  static constexpr bool kPacked = HEADS == 4;
  static constexpr int kRegisters = kPacked ? 2 : 4;
  uint32_t a[CHUNKS][kRegisters];

  // rows: [2 terms][8 heads][row_bytes]
  __device__ __forceinline__ void load(const uint8_t* rows, int row_bytes, int lane) {
    const int g = lane >> 2, i = lane & 3;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
      for (int k = 0; k < kRegisters; ++k) {
        const int term = kPacked ? g >> 2 : k & 1, head = HEADS == 4 ? g & 3 : g,
                  second = kPacked ? k : k >> 1;
        a[c][k] = __ldcg(reinterpret_cast<const unsigned int*>(
            rows + (term * 8 + head) * row_bytes + c * 32 + second * 16 + i * 4));
      }
    }
  }

  // The product for tokens of tile `tile`.
  template <class Element>
  __device__ __forceinline__ void multiply(Element (&c)[4], int product, int tile, uint32_t b0,
                                           uint32_t b1) const {
    const uint32_t(&r)[kRegisters] = a[product];
    if constexpr (!kPacked) {
      one(c, r[0], r[1], r[2], r[3], b0, b1);
    } else if (tile & 1) {
      one(c, 0, r[0], 0, r[1], b0, b1);
    } else {
      one(c, r[0], 0, r[1], 0, b0, b1);
    }
  }

 private:
  template <class Element>
  __device__ __forceinline__ static void one(Element (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
    if constexpr (kKind == kInt8) {
      mma_s8(c, a0, a1, a2, a3, b0, b1);
    } else {
      mma_f16(c, a0, a1, a2, a3, b0, b1);
    }
  }
};

// Scores of one step, in units of the query's scale.
template <Kind kKind, int HEADS, int CHUNKS, class TableType>
__device__ __forceinline__ void step_scores(const uint32_t (&words)[2 * CHUNKS],
                                            const TableType& tables,
                                            const Query<kKind, HEADS, CHUNKS>& query, int lane,
                                            float (&s)[HEADS == 4 ? 4 : 8]) {
  using Element = std::conditional_t<kKind == kInt8, int, float>;
  constexpr int kTiles = HEADS == 4 ? 2 : 4;
  Element c[kTiles][4] = {};
  // Tiles 0, 2, 1, 3: products that follow each other add into different accumulators.
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int tile = (t & 1) * 2 + (t >> 1), half_word = tile * CHUNKS + chunk;
      const uint32_t word = words[half_word / 2];
      uint32_t e0, e1;
      if (half_word % 2 == 0) {
        e0 = tables.template look<0>(word, chunk * 8);
        e1 = tables.template look<1>(word, chunk * 8 + 4);
      } else {
        e0 = tables.template look<2>(word, chunk * 8);
        e1 = tables.template look<3>(word, chunk * 8 + 4);
      }
      Element(&to)[4] = c[HEADS == 4 ? tile >> 1 : tile];
      query.multiply(to, chunk, tile, e0, e1);
    }
  }
#pragma unroll
  for (int j = 0; j < (HEADS == 4 ? 4 : 8); ++j) {
    const int tile = HEADS == 4 ? j >> 1 : (j < 4 ? j >> 1 << 1 : (((j - 4) >> 1) << 1) + 1);
    Element high = c[tile][j & 1], low = c[tile][2 + (j & 1)];
    if constexpr (Query<kKind, HEADS, CHUNKS>::kPacked) {
      // Rows g: a term of half 0, rows g + 8: of half 1. Lanes of the high terms keep half 0.
      const bool is_high = lane < 16;
      const Element kept = is_high ? high : low;
      const Element received = __shfl_xor_sync(0xffffffffu, is_high ? low : high, 16);
      high = is_high ? kept : received;
      low = is_high ? received : kept;
    }
    if constexpr (kKind == kInt8) {
      s[j] = __int2float_rn(high * 256 + low);
    } else {
      s[j] = high + low;
    }
  }
}

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
// int8 entries: probabilities are 16-bit integers, 2^kProbabilityBits or less, as two bytes. HEADS
// 4: columns 0..3 take the high bytes, 4..7 the low ones. HEADS 8: two sets of accumulators. half
// entries: probabilities in fp16; HEADS 4: columns 0..3 sum tokens of half 0, 4..7 of half 1.
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

  // Operand B from probabilities p[j], laid out as scores are: b[term][half] for int8,
  // b[half][0..1] for fp16.
  __device__ __forceinline__ void pack(const float (&p)[HEADS == 4 ? 4 : 8], int lane,
                                       uint32_t (&b)[2][2]) const {
    if constexpr (kHalf) {
      uint32_t h[HEADS == 4 ? 2 : 4];
#pragma unroll
      for (int k = 0; k < (HEADS == 4 ? 2 : 4); ++k) {
        const __half2 pair = __floats2half2_rn(p[2 * k], p[2 * k + 1]);
        h[k] = *reinterpret_cast<const uint32_t*>(&pair);
      }
      if constexpr (HEADS == 4) {
        const bool low = lane < 16;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          b[0][k] = low ? h[k] : 0u;
          b[1][k] = low ? 0u : h[k];
        }
      } else {
        b[0][0] = h[0];
        b[0][1] = h[1];
        b[1][0] = h[2];
        b[1][1] = h[3];
      }
    } else {
      // Adding 2^23 leaves the rounded integer in the low bits of the float.
      constexpr int kQuads = HEADS == 4 ? 1 : 2;
      uint32_t high[kQuads], low[kQuads];
#pragma unroll
      for (int k = 0; k < kQuads; ++k) {
        uint32_t x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = __float_as_uint(p[4 * k + j] + 8388608.0f);
        const uint32_t y0 = __byte_perm(x[0], x[1], 0x4051), y1 = __byte_perm(x[2], x[3], 0x4051);
        high[k] = __byte_perm(y0, y1, 0x5410);
        low[k] = __byte_perm(y0, y1, 0x7632);
      }
      if constexpr (HEADS == 4) {
        const bool first = lane < 16;
        const uint32_t received = __shfl_xor_sync(0xffffffffu, first ? low[0] : high[0], 16);
        b[0][0] = first ? high[0] : received;
        b[0][1] = first ? received : low[0];
      } else {
        b[0][0] = high[0];
        b[0][1] = high[1];
        b[1][0] = low[0];
        b[1][1] = low[1];
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
          mma_f16(acc[0][r][0], __byte_perm(e0, e1, 0x5410), __byte_perm(e0, e1, 0x7632),
                  __byte_perm(e2, e3, 0x5410), __byte_perm(e2, e3, 0x7632), b[h][0], b[h][1]);
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

  // The reference of head h rose by delta[h] (its value in the lanes with g = h): scale the sums
  // down.
  __device__ __forceinline__ void lower(float delta, int lane) {
    float d[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = 2 * (lane & 3) + e;
      d[e] = __shfl_sync(0xffffffffu, delta, 4 * (HEADS == 4 ? column & 3 : column));
    }
    if constexpr (kHalf) {
      const float factor[2] = {exp2_fast(-d[0]), exp2_fast(-d[1])};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sum[0][k] *= factor[k & 1];
#pragma unroll
        for (int r = 0; r < CHUNKS; ++r) {
#pragma unroll
          for (int x = 0; x < kRows; ++x) acc[0][r][x][k] *= factor[k & 1];
        }
      }
    } else {
      // Past 22 bits nothing that counts is left of the old sums.
      int shift[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) shift[e] = d[e] > 22.5f ? 31 : __float2int_rn(d[e]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        shift_terms(sum[0][k], sum[kTerms - 1][k], shift[k & 1], lane);
#pragma unroll
        for (int r = 0; r < CHUNKS; ++r) {
#pragma unroll
          for (int x = 0; x < kRows; ++x)
            shift_terms(acc[0][r][x][k], acc[kTerms - 1][r][x][k], shift[k & 1], lane);
        }
      }
    }
  }

  // (256 high + low) >> shift, where the bits that leave the high term go on into the low one.
  // HEADS 4: both terms are `high`, in lanes of i < 2 and i >= 2.
  __device__ __forceinline__ static void shift_terms(Element& high, Element& low, int shift,
                                                     int lane) {
    if constexpr (!kHalf) {
      const int rest = shift == 31 ? 0 : (high & ((1 << shift) - 1)) << 8;
      if constexpr (HEADS == 4) {
        const int carried = __shfl_xor_sync(0xffffffffu, rest, 2);
        high = (lane & 2) ? (shift == 31 ? 0 : (high + carried) >> shift) : high >> shift;
        if (shift == 31) high = 0;
      } else {
        low = shift == 31 ? 0 : (low + rest) >> shift;
        high = shift == 31 ? 0 : high >> shift;
      }
    }
  }

  // One number from a column's terms (this lane's and, for HEADS 4, those of lane ^ 2).
  __device__ __forceinline__ float joined(Element first, Element second) const {
    if constexpr (HEADS == 4) {
      const Element other = __shfl_xor_sync(0xffffffffu, first, 2);
      return kHalf ? static_cast<float>(first) + static_cast<float>(other)
                   : 256.0f * static_cast<float>(first) + static_cast<float>(other);
    } else {
      return kTerms == 2 ? 256.0f * static_cast<float>(first) + static_cast<float>(second)
                         : static_cast<float>(first);
    }
  }

  // Writes out[head][D] and sums[head], each times `unit`. Entries beyond D (padding) are left out.
  __device__ __forceinline__ void write(float* out, float* sums, int head_dim, int lane) const {
    const int g = lane >> 2, i = lane & 3;
    const bool owner = HEADS == 8 || i < 2;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float s = joined(sum[0][e], sum[kTerms - 1][e]);
      if (owner && g == 0) sums[2 * i + e] = s;
    }
#pragma unroll
    for (int r = 0; r < CHUNKS; ++r) {
#pragma unroll
      for (int x = 0; x < kRows; ++x) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float value = joined(acc[0][r][x][k], acc[kTerms - 1][r][x][k]);
          const int d = (r * 8 + g) * 2 * kRows + 2 * x + (k >> 1);
          if (owner && d < head_dim) out[(2 * i + (k & 1)) * head_dim + d] = value;
        }
      }
    }
  }
};

}  // namespace veloxquant::attention::cuda
