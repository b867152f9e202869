// Integer levels of rotated tokens, and their bit planes in a block: what RaBitQ (1 to 4 bits) and
// QJL (signs) have in common.
//
// A code u of B bits stands for the level z = 2 u - (2^B - 1): -1, +1 at one bit, -3 -1 +1 +3 at
// two. Planes: [rows][B][8 bytes]; bit t of the 8 bytes of (row, p) is bit p of the code of token
// t. So a decoder turns 8 bytes into the signs of 64 tokens, and a level is a sum of +-2^p.
#pragma once

#include <cstdint>

#include "src/math/integer_levels.h"
#include "veloxquant/backend.h"
#include "veloxquant/codec.h"

namespace veloxquant::rabitq {

constexpr int kMaxBits = 4;
constexpr int kPlaneBytes = kBlockTokens / 8;

inline int64_t plane_bytes(int rows, int bits) {
  return static_cast<int64_t>(rows) * bits * kPlaneBytes;
}

// Sums over rows run in ascending order; all 64 columns of the tiles are valid.
struct LevelKernels {
  // y_t: fp32 [rows][64]. planes: all bytes written. squares[t] = sum y^2, dots[t] = sum y z,
  // levels[t] = sum z^2.
  void (*encode)(const float* y_t, int rows, int bits, uint8_t* planes, float* squares, float* dots,
                 float* levels);
  // y_t[r][t] = scale[t] * z + mean[r]; scale null: 1, mean null: 0.
  void (*decode)(const uint8_t* planes, int rows, int bits, const float* scale, const float* mean,
                 float* y_t);
};

const LevelKernels& reference_levels();
const LevelKernels& cpu_levels();
inline const LevelKernels& levels_of(Backend backend) {
  return backend == Backend::reference ? reference_levels() : cpu_levels();
}

// Row-major tokens to a tile of 64 columns and back; columns from n_tokens on become zero.
void to_tile(const float* rows, int n_tokens, int dim, float* tile);
void from_tile(const float* tile, int n_tokens, int dim, float* rows, int64_t row_stride);

// Clears the bits of tokens that the block does not have.
void clear_tokens_from(int n_tokens, int64_t n_planes, uint8_t* planes);

// The code of one token in one row, and setting it in planes that are zero there.
uint32_t get_code(const uint8_t* planes, int bits, int row, int t);
void set_code(uint8_t* planes, int bits, int row, int t, uint32_t code);

// Bit k of byte i <-> bit i of byte k: three swaps of ever larger squares (Hacker's Delight 7-3).
inline uint64_t transpose_bits(uint64_t x) {
  uint64_t t = (x ^ (x >> 7)) & 0x00aa00aa00aa00aaull;
  x ^= t ^ (t << 7);
  t = (x ^ (x >> 14)) & 0x0000cccc0000ccccull;
  x ^= t ^ (t << 14);
  t = (x ^ (x >> 28)) & 0x00000000f0f0f0f0ull;
  return x ^ t ^ (t << 28);
}

// Planes of one bit, [m][8 bytes], as rows of m bits, [n_tokens][m / 8], and back (planes zero).
void planes_to_rows(const uint8_t* planes, int m, int n_tokens, uint8_t* rows, int64_t row_stride);
void rows_to_planes(const uint8_t* rows, int64_t row_stride, int m, int n_tokens, uint8_t* planes);

}  // namespace veloxquant::rabitq
