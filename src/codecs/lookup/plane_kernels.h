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

bool permutes_pairs_at_once();  // a permutation of two registers costs what one of one does: AMD

constexpr int plane_size(int bits) { return bits <= 4 ? 16 : 256; }

// x [n][size] -> n tables of round(x * factor) + bias: its low `low_bits` bits and the rest. x is
// aligned, as all floats below are; size: plane_size().
void split_planes(const float* x, int n, int size, float factor, int bias, int low_bits,
                  uint8_t* planes);
float largest_magnitude(const float* x, int n);  // n a multiple of 16

// What the values of a digit stand for, [dim][size], zeros beyond the last value.
struct PlaneColumns {
  const void* data = nullptr;
  bool in_fp16 = false;  // else fp32
  int size = 0, dim = 0;
};
// entries [n_rows][size], `stride` apart, = q . columns, q [n_rows][dim]; raises most [n_rows] to
// the largest magnitude. n_rows: 1 to 4.
void make_plane_entries(const PlaneColumns& columns, const float* q, int64_t q_stride, int n_rows,
                        float* entries, int64_t stride, float* most);
// sums [n][16] -> out [n]
void fold_plane_sums(const float* sums, int n, float* out);

// Digits are numbered byte after byte, `digits_a_byte` in each, the first in the low bits.
struct PlaneDigits {
  int bits = 8;
  int a_byte = 1;
  bool by_halves = permutes_pairs_at_once();  // how tables of 256 are looked up; same results
};

// scores [64 * n_blocks] = (sum over the digits of their 14-bit entries - zero) * step * factors;
// tables [digits], of 7-bit planes. factors [64 * n_blocks] or null.
void score_planes(const Blocks& blocks, const PlaneDigits& digits, const uint8_t* tables, int zero,
                  float step, const float* factors, float* scores);

// weights * factors [n] -> row `row` of n_rows of integers of up to 15 bits, in the order of
// add_planes; returns their unit. n: a multiple of 64, up to kVectorsAUnit * plane_lanes(). Where
// many tokens have large weights they have fewer bits, so that sums of 32 bits hold.
constexpr int kVectorsAUnit = 16;
float weights_to_planes(const float* weights, int n, const float* factors, int row, int n_rows,
                        int16_t* integers);
// sums [n_dims][n_rows][16] += sum over tokens of weights * look-ups of the n_dims dimensions of
// byte m, those of its first digit first. tables [n_dims], 14 bits in planes of 8; units [n_rows]
// of each kVectorsAUnit * plane_lanes() tokens.
void add_planes(const Blocks& blocks, int m, const PlaneDigits& digits, int n_dims,
                const uint8_t* tables, const int16_t* integers, const float* units, int n_rows,
                float* sums);

}  // namespace veloxquant::lookup
