// The packed block of VecInfer, drawn in README.md.
#pragma once

#include <cstdint>

#include "veloxquant/codec.h"

namespace veloxquant::vecinfer {

constexpr int kMaxCentroids = 256;
constexpr int kMaxSubDim = 64;
constexpr int kMaxHeadDim = 1024;

inline int code_bits(int n_centroids) { return n_centroids <= 16 ? 4 : 8; }

// Bytes of the 64 codes of one sub-vector.
inline int64_t row_bytes(int bits) { return kBlockTokens * bits / 8; }

// Code of token t in a row of 64 codes. 8 bits: byte t. 4 bits: byte t % 32, low nibble for
// tokens 0..31 and high nibble for 32..63, so that one mask and one shift give 32 codes each.
inline uint32_t get_code(const uint8_t* row, int bits, int t) {
  if (bits == 8) return row[t];
  uint8_t byte = row[t % 32];
  return t < 32 ? byte & 15u : byte >> 4;
}

inline void set_code(uint8_t* row, int bits, int t, uint32_t code) {
  if (bits == 8) {
    row[t] = static_cast<uint8_t>(code);
  } else if (t < 32) {
    row[t] = static_cast<uint8_t>((row[t] & 0xf0u) | code);
  } else {
    row[t - 32] = static_cast<uint8_t>((row[t - 32] & 0x0fu) | (code << 4));
  }
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
