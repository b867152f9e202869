// The packed block of CommVQ, drawn in README.md.
#pragma once

#include <cstdint>

#include "veloxquant/codec.h"

namespace veloxquant::commvq {

constexpr int kMaxEntries = 64;  // entries of one factor: 6 bits
constexpr int kMaxStages = 64;
constexpr int kMaxPairs = 128;  // head_dim 256
constexpr int kCodeBits = 12;   // a * 64 + b

// 64 codes of 12 bits, least significant bits first: two codes in three bytes.
constexpr int64_t kRowBytes = kBlockTokens * kCodeBits / 8;
constexpr int64_t kScalarBytes = kBlockTokens * 2;  // fp16 rms of every token
static_assert(kRowBytes == 96 && kScalarBytes == 128);

inline int64_t block_bytes(int n_stages) { return n_stages * kRowBytes + kScalarBytes; }

inline void unpack_row(const uint8_t* row, uint16_t* codes) {
  for (int t = 0; t < kBlockTokens; t += 2, row += 3) {
    codes[t] = static_cast<uint16_t>(row[0] | (row[1] & 15) << 8);
    codes[t + 1] = static_cast<uint16_t>(row[1] >> 4 | row[2] << 4);
  }
}

inline void pack_row(const uint16_t* codes, uint8_t* row) {
  for (int t = 0; t < kBlockTokens; t += 2, row += 3) {
    row[0] = static_cast<uint8_t>(codes[t]);
    row[1] = static_cast<uint8_t>(codes[t] >> 8 | (codes[t + 1] & 15) << 4);
    row[2] = static_cast<uint8_t>(codes[t + 1] >> 4);
  }
}

// The factors of a code, clamped to the table.
inline int factor_a(uint16_t code, int n_entries) {
  const int a = code >> 6;
  return a < n_entries ? a : n_entries - 1;
}
inline int factor_b(uint16_t code, int n_entries) {
  const int b = code & 63;
  return b < n_entries ? b : n_entries - 1;
}

// One KV head as the kernels see it: raw pointers, no ownership.
struct HeadTables {
  int n_pairs = 0;
  int n_stages = 0;
  int n_entries = 0;
  const uint16_t* codebook = nullptr;  // fp16 [stages][entries][2][pairs]: x, then y

  int64_t entry_size() const { return 2 * int64_t{n_pairs}; }
  int64_t stage_size() const { return n_entries * entry_size(); }
  const uint16_t* stage(int r) const { return codebook + r * stage_size(); }
};

}  // namespace veloxquant::commvq
