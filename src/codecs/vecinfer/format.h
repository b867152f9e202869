// The packed block of VecInfer, drawn in README.md.
#pragma once

#include <cstdint>

#include "veloxquant/codec.h"

namespace veloxquant::vecinfer {

constexpr int kMaxCentroids = 4096;
constexpr int kMaxSubDim = 64;
constexpr int kMaxHeadDim = 1024;

// 4, 6, 8, 10 or 12.
inline int code_bits(int n_centroids) {
  int bits = 4;
  while ((1 << bits) < n_centroids) bits += 2;
  return bits;
}

// Bytes of the 64 codes of one sub-vector.
inline int64_t row_bytes(int bits) { return kBlockTokens * bits / 8; }

// A row of codes is up to two planes of 64 fields of 8, 4 or 2 bits: the low 8 (or 4) bits of every
// code, then the rest. Fields of 4 bits: byte t % 32, low half for tokens 0..31 and high half for
// 32..63, so that one mask and one shift give 32 of them each; of 2 bits: byte t % 16, bits
// 2 * (t / 16).
inline int low_bits(int bits) { return bits >= 8 ? 8 : 4; }

inline uint32_t get_field(const uint8_t* plane, int width, int t) {
  const int per_byte = 8 / width, tokens = kBlockTokens / per_byte;
  return (plane[t % tokens] >> (width * (t / tokens))) & ((1u << width) - 1u);
}

inline void set_field(uint8_t* plane, int width, int t, uint32_t value) {
  const int per_byte = 8 / width, tokens = kBlockTokens / per_byte;
  const int shift = width * (t / tokens);
  const uint32_t mask = ((1u << width) - 1u) << shift;
  uint8_t& byte = plane[t % tokens];
  byte = static_cast<uint8_t>((byte & ~mask) | ((value << shift) & mask));
}

inline uint32_t get_code(const uint8_t* row, int bits, int t) {
  const int low = low_bits(bits);
  uint32_t code = get_field(row, low, t);
  if (bits > low) code |= get_field(row + row_bytes(low), bits - low, t) << low;
  return code;
}

inline void set_code(uint8_t* row, int bits, int t, uint32_t code) {
  const int low = low_bits(bits);
  set_field(row, low, t, code);
  if (bits > low) set_field(row + row_bytes(low), bits - low, t, code >> low);
}

// One KV head of one side as the kernels see it: raw pointers, no ownership.
struct HeadTables {
  int head_dim = 0;
  int n_subvectors = 0;
  int sub_dim = 0;
  int n_centroids = 0;
  int bits = 8;
  const uint16_t* tables = nullptr;  // fp16 [M or 1][C][d]
  int64_t table_stride = 0;          // elements from one sub-vector's table to the next; 0: shared

  const uint16_t* table(int m) const { return tables + m * table_stride; }
};

}  // namespace veloxquant::vecinfer
