// Packed blocks of VecInfer on Metal: 64 tokens of a KV head to the bytes of format.h, and back.
#pragma once

#include "src/codecs/vecinfer/metal.h"
#include "src/codecs/vecinfer/metal_codes.h"

namespace veloxquant {

// A threadgroup takes eight tokens of a block that share all their bytes: t, t + 16, t + 32, t + 48
// for two neighbouring t, so that no byte has two writers.
VQ_FN int vecinfer_tile_token(int eighth, int row) { return 2 * eighth + row % 2 + 16 * (row / 2); }

// x [n_tokens][DIM] of one plane -> blocks; absent tokens count as 0. TRANSFORM: 0 none, 1 times
// inverse_scale, then Hadamard, 2 matrix (y = x E). group: (eighth, block, plane).
template <int DIM, int SUB, int C, int BITS, int TABLES, int TRANSFORM, class X, class Table,
          class Forward, class Bytes, class Rows, class Tile>
VQ_FN void vecinfer_encode_blocks(X x, int n_tokens, int n_heads, int n_sequences, Table tables,
                                  Forward forward, Bytes blocks, Rows rows, Rows moved, Tile tile,
                                  uint3 group, uint self, uint n_threads) {
  const int M = DIM / SUB, eighth = (int)group.x;
  const int64_t plane = group.z;
  const int head = (int)(plane % n_heads), sequence = n_sequences == 1 ? 0 : (int)(plane / n_heads);
  for (uint i = self; i < 8 * DIM; i += n_threads) {
    const int token = 64 * (int)group.y + vecinfer_tile_token(eighth, (int)(i / DIM));
    float value = 0.0f;
    if (token < n_tokens) value = (float)x[(plane * n_tokens + token) * DIM + i % DIM];
    if (TRANSFORM == 1) value = mul(value, forward[head * DIM + i % DIM]);
    rows[i] = value;
  }
  if (TRANSFORM == 1) hadamard_rows<DIM>(rows, 8, self, n_threads);
  if (TRANSFORM == 2) {
    multiply_rows<DIM, true>(forward + (int64_t)head * DIM * DIM, rows, moved, 8, self, n_threads);
    for (uint i = self; i < 8 * DIM; i += n_threads) rows[i] = moved[i];
  }
  barrier_of_group();
  nearest_codes<DIM, SUB, C, 8>(
      rows, tables + ((int64_t)sequence * n_heads + head) * (TABLES * C * SUB),
      TABLES == 1 ? 0 : C * SUB, tile, self / 32, n_threads / 32, self % 32);
  barrier_of_group();
  const int low = BITS >= 8 ? 8 : 4, row_bytes = 8 * BITS;
  Bytes block = blocks + (plane * ((n_tokens + 63) / 64) + group.y) * (M * row_bytes);
  for (uint i = self; i < (uint)(8 * M); i += n_threads) {
    const int m = (int)i / 8, r = (int)i % 8, t = vecinfer_tile_token(eighth, r);
    Bytes bytes = block + m * row_bytes;
    const uint32_t code = tile[r * M + m];
    if (low == 8) bytes[t] = (uint8_t)code;
    if (r < 4 && low == 4)
      bytes[t] = (uint8_t)((code & 15u) | ((tile[(r + 4) * M + m] & 15u) << 4));
    if (r < 4 && BITS == 12) {
      bytes[64 + t] = (uint8_t)((code >> 8) | ((uint32_t)(tile[(r + 4) * M + m] >> 8) << 4));
    }
    if (r < 2 && (BITS == 6 || BITS == 10)) {
      uint32_t field = 0u;
      for (int k = 0; k < 4; ++k)
        field |= ((uint32_t)(tile[(r + 2 * k) * M + m] >> low) & 3u) << (2 * k);
      bytes[8 * low + t] = (uint8_t)field;
    }
  }
}

// blocks (as 32-bit words) -> y [n_blocks * 64][DIM] in the codec's coordinates.
// thread: (element of a block, block, plane).
template <int DIM, int SUB, int C, int BITS, int TABLES, class Words, class Table, class Out>
VQ_FN void vecinfer_decode_blocks(Words blocks, int n_blocks, int n_heads, int n_sequences,
                                  Table tables, Out out, uint3 at) {
  const int M = DIM / SUB, t = (int)at.x / DIM, d = (int)at.x % DIM, m = d / SUB;
  const int64_t plane = at.z;
  const int64_t table =
      (n_sequences == 1 ? plane % n_heads : plane) * TABLES + (TABLES == 1 ? 0 : m);
  Words row = blocks + ((plane * n_blocks + at.y) * M + m) * vecinfer_row_words(BITS);
  const uint32_t w = (uint32_t)t / 4u;
  const uint32_t code = vecinfer_code<BITS, C>(vecinfer_low_codes<BITS>(row, w),
                                               vecinfer_high_codes<BITS>(row, w), (uint32_t)t % 4u);
  out[(plane * n_blocks + at.y) * 64 * DIM + at.x] =
      (float)tables[(table * C + code) * SUB + d % SUB];
}

}  // namespace veloxquant
