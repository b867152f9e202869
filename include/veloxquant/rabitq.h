// RaBitQ (arXiv 2405.12497, 2409.09913): rotated sign and integer codes with an unbiased scalar.
#pragma once

#include <cstdint>
#include <vector>

#include "veloxquant/codec.h"

namespace veloxquant {

// What the scalar of a token makes right; y is the rotated token, z its integer levels.
enum class RabitqScale : uint8_t {
  unbiased = 0,        // |y|^2 / <y, z>: inner products are right on average (keys)
  reconstruction = 1,  // <y, z> / |z|^2: the least squared error (values)
  norm = 2             // |y| / |z|: the decoded token has the norm of the original
};

struct RabitqOptions {
  int bits = 1;  // 1..4 a dimension
  RabitqScale scale = RabitqScale::unbiased;
  uint64_t seed = 0;
  // fp32 [n_kv_heads, head_dim], original coordinates; empty means 0. Tokens are stored as what
  // they differ from it, decode adds it back.
  TensorView mean;
};

CodecPtr make_rabitq_codec(Side side, int n_kv_heads, int head_dim, const RabitqOptions& options);

// The 1-bit codes of n tokens of fp32 [n][dim] in the layout of the scans, [n][dim / 8], and what
// their scores are multiplied with, [n]: fp32, the unbiased scalar |y|^2 / |y|_1 of the codec
// before it is rounded to 16 bits. dim: a multiple of 8 up to 1024. NaN counts as 0, infinities as
// +-65504.
void rabitq_encode(Backend backend, const float* x, int64_t n, int dim, uint64_t seed,
                   uint8_t* codes, float* factors);

// In place on n rows of fp32 [n][dim]: the rotation of that seed, for queries.
void rabitq_rotate(Backend backend, float* rows, int64_t n, int dim, uint64_t seed);

// out[i] = popcount(query XOR codes[i]) * scale + offset[i], over the first n_dims bits, least
// significant bit first; lower is closer. A pre-filter: its expectation is not linear in the
// inner product. codes: [n][ceil(n_dims / 8)], out and offset: [n]. n_dims: 1..32768.
void hamming_score(Backend backend, const uint8_t* query, const uint8_t* codes, int64_t n,
                   int n_dims, const float* offset, float scale, float* out);

// A rotated query in n_bits-bit integers: q[i] ~ low + step * u[i], u[i] rounded to nearest
// (ties up). planes[j] holds bit j of every u[i], packed as the codes are.
struct PopcountQuery {
  int n_dims = 0;
  int n_bits = 0;
  float low = 0.0f;
  float step = 0.0f;
  uint32_t sum = 0;             // of u[i]
  std::vector<uint8_t> planes;  // [n_bits][ceil(n_dims / 8)]
};

// q: fp32 [n_dims], finite. n_bits: 1..8; 4 is enough for 1-bit codes.
PopcountQuery quantize_popcount_query(const float* q, int n_dims, int n_bits);

// The integer dot products <x_i, u> and counts sum_j x_i[j] of 0/1 codes x. Exact.
void popcount_dots(Backend backend, const PopcountQuery& query, const uint8_t* codes, int64_t n,
                   uint32_t* dots, uint32_t* counts);

// out[i] = factors[i] * <q^, 2 x_i - 1>, q^ the quantised query:
// factors[i] * (2 step <x_i, u> + 2 low sum(x_i) - (step sum(u) + n_dims low)).
void popcount_score(Backend backend, const PopcountQuery& query, const uint8_t* codes, int64_t n,
                    const float* factors, float* out);

}  // namespace veloxquant
