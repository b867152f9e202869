// RaBitQ's Hamming scan on Metal: a thread a code. Integers, one product, one sum: equal
// everywhere.
#pragma once

#include "src/math/portable.h"

namespace veloxquant {

// out[i] = popcount((query ^ codes[i]) over N_DIMS bits) * scale + offset[i]
template <int N_DIMS, class Query, class Codes, class Offset, class Scale, class Out>
VQ_FN void hamming_scan(Query query, Codes codes, Offset offset, Scale scale, Out out, uint i) {
  const int n_bytes = (N_DIMS + 7) / 8;
  uint32_t distance = 0u;
  Codes code = codes + (int64_t)i * n_bytes;
  for (int b = 0; b < n_bytes; ++b) {
    const uint32_t mask = b + 1 == n_bytes && N_DIMS % 8 != 0 ? (1u << (N_DIMS % 8)) - 1u : 255u;
    distance += popcount(((uint32_t)query[b] ^ (uint32_t)code[b]) & mask);
  }
  out[i] = mul((float)distance, (float)scale[0]) + offset[i];
}

}  // namespace veloxquant
