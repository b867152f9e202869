// The packed block of the scalar codecs (turboquant, rvq), drawn in README.md.
#pragma once

#include <cstdint>

#include "veloxquant/codec.h"

namespace veloxquant::turboquant {

constexpr int kMaxHeadDim = 1024;
constexpr int kMaxPlanes = 2;
constexpr int kMaxScalars = 2;

// A block holds planes of codes, then fp16 scalars:
//   plane    [rows][columns * bits / 8]   codes of a row as a stream, least significant bits first
//   scalars  [n_scalars][64]
// keys: a row is a dimension and its columns are the 64 tokens; values: a row is a token and its
// columns are the dimensions. Attention reads keys by dimension and values by token, so neither
// is ever transposed there.
struct BlockShape {
  Side side = Side::keys;
  int head_dim = 0;
  int n_planes = 1;
  int bits[kMaxPlanes] = {};
  int n_scalars = 1;

  bool by_token() const { return side == Side::values; }
  int rows() const { return by_token() ? kBlockTokens : head_dim; }
  int columns() const { return by_token() ? head_dim : kBlockTokens; }
  int64_t row_bytes(int plane) const { return int64_t{columns()} * bits[plane] / 8; }
  // Bytes of a token in plane order, without scalars.
  int64_t token_plane_bytes(int plane) const { return int64_t{head_dim} * bits[plane] / 8; }
  int64_t plane_offset(int plane) const {
    int64_t offset = 0;
    for (int p = 0; p < plane; ++p) offset += kBlockTokens * token_plane_bytes(p);
    return offset;
  }
  int64_t scalar_offset() const { return plane_offset(n_planes); }
  int64_t block_bytes() const { return scalar_offset() + 2 * kBlockTokens * n_scalars; }
  int64_t token_bytes() const { return block_bytes() / kBlockTokens; }
};

}  // namespace veloxquant::turboquant
