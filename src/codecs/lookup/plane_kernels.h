// The inner loops of plane_codes.h, compiled once per SIMD level.
//
// A table is two planes of bytes, [low n][high n] for the 2^bits values of a digit: n = 16 up to 4
// bits, 256 beyond. A vector holds the bytes of `plane_lanes()` tokens.
#pragma once

#include <cstdint>

#include "src/codecs/lookup/byte_kernels.h"

namespace veloxquant::lookup {

constexpr int kPlaneRows = 4;         // query rows of a panel, at most
constexpr int kPlaneFloats = 16;      // partial sums of a dimension and row
constexpr int kMaxPlaneDigits = 512;  // so that sums of bytes fit 16 bits

int plane_lanes();       // 16, 32 or 64; 0 where there is no kernel
bool has_wide_tables();  // 256 bytes are looked up in registers: AVX-512 VBMI

constexpr int plane_size(int bits) { return bits <= 4 ? 16 : 256; }

// x -> round(x * factor) + bias, its low `low_bits` bits and the rest; n a multiple of 4.
void split_planes(const float* x, int n, float factor, int bias, int low_bits, uint8_t* low,
                  uint8_t* high);
float largest_magnitude(const float* x, int n);
// sums [n][16] -> out [n]
void fold_plane_sums(const float* sums, int n, float* out);

// Digits are numbered byte after byte, `digits_a_byte` in each, the first in the low bits.
struct PlaneDigits {
  int bits = 8;
  int a_byte = 1;
};

// Adds the look-ups of all digits to totals, which start at 0: for each row and vector of tokens
// [sums of low planes][those of odd tokens][high planes][odd tokens], 16 bits each, where the first
// of two holds even tokens plus 256 times odd ones. tables [digits][n_rows], of 7-bit planes.
void look_up_planes(const Blocks& blocks, const PlaneDigits& digits, const uint8_t* tables,
                    int n_rows, uint8_t* totals);
// totals of one row -> scores [64 * n_blocks] = (high * 128 + low - zero) * step * factors.
void finish_planes(const uint8_t* totals, int n_blocks, int zero, float step, const float* factors,
                   float* scores);

// weights * factors of up to 4 rows -> integers of 13 bits in the order of add_planes, and the
// scale of each row and plane_group() blocks, [groups][n_rows].
int plane_group();
void weights_to_planes(const float* weights, int64_t stride, int n_rows, int n_blocks,
                       const float* factors, int16_t* integers, float* scales);
// sums [n_rows][16] += weights * look-ups of one digit of byte m, 15 bits in planes of 8.
void add_planes(const Blocks& blocks, int m, int shift, const PlaneDigits& digits,
                const uint8_t* table, const int16_t* integers, const float* scales, int n_rows,
                float* sums);

}  // namespace veloxquant::lookup
