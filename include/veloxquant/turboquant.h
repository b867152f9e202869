// TurboQuant (arXiv 2504.19874): rotate, quantise each coordinate by a fixed table, keep one
// scalar a token. Needs no calibration.
#pragma once

#include <cstdint>

#include "veloxquant/codec.h"

namespace veloxquant {

// The scalar s of a reconstruction |k| s z (z: the table values of a token, ALGORITHMS 0.1).
//   norm_corrected  |k| / |z|      the reconstruction has the norm of the token
//   raw             |k| / sqrt(D)  the paper's
//   unbiased        |k|^2 / <y, z> inner products are right on average
enum class ScalarScale { norm_corrected, raw, unbiased };

struct TurboQuantOptions {
  int bits = 2;  // 1..4
  ScalarScale scale = ScalarScale::norm_corrected;
  // The paper's inner-product form: bits - 1 bits of table, one sign bit of a random projection of
  // what they leave. Its scale is `raw`, as in the paper.
  bool prod = false;
  uint64_t seed = 0;  // of the rotation, and of the projection
};

// head_dim: a multiple of 8 up to 1024. D bits / 8 + 2 bytes a token (prod: + 4).
CodecPtr make_turboquant_codec(Side side, int n_kv_heads, int head_dim,
                               const TurboQuantOptions& options);

struct RvqOptions {
  int bits = 1;  // of each of the two stages, 1..4
  ScalarScale scale = ScalarScale::norm_corrected;
  uint64_t seed = 0;
};

// Two stages of `bits` bits: the second quantises what the first leaves. 2 D bits / 8 + 2 bytes a
// token: 2 bits + 16 / D an element.
CodecPtr make_rvq_codec(Side side, int n_kv_heads, int head_dim, const RvqOptions& options);

}  // namespace veloxquant
