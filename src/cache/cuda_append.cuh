// How both appends store a token.
#pragma once

#include "src/codecs/vecinfer/cuda_encode.cuh"

namespace veloxquant::cuda {

// As the cache's append on the CPU: NaN is 0, what 16 bits cannot hold is the largest they can.
__device__ inline uint16_t narrow_clean(float x, int bf16) {
  const uint16_t bits = bf16 ? f32_to_bf16(x) : f32_to_f16(x);
  const uint16_t infinity = bf16 ? 0x7f80 : 0x7c00;
  return (bits & 0x7fff) >= infinity ? static_cast<uint16_t>((bits & 0x8000) | (infinity - 1))
                                     : bits;
}

// A side's exact storage and the token that comes into it: one for each [sequence][head].
struct ExactRows {
  uint16_t* exact;
  int64_t exact_batch, exact_head, exact_token;
  const void* x;
  int64_t x_batch, x_head;

  __device__ uint16_t* rows(int sequence, int head) const {
    return exact + sequence * exact_batch + head * exact_head;
  }
  // By all of n_threads.
  __device__ void store(int sequence, int head, int64_t slot, int dim, int x_type, int exact_bf16,
                        int n_threads) const {
    uint16_t* row = rows(sequence, head) + slot * exact_token;
    for (int d = threadIdx.x; d < dim; d += n_threads) {
      const float token = load_clean(x, sequence * x_batch + head * x_head + d, x_type);
      row[d] = narrow_clean(token, exact_bf16);
    }
  }
};

inline ExactRows exact_rows(const ExactSide& exact, const ExactSide& x) {
  return {static_cast<uint16_t*>(const_cast<void*>(exact.data)),
          exact.batch_stride,
          exact.head_stride,
          exact.token_stride,
          x.data,
          x.batch_stride,
          x.head_stride};
}

}  // namespace veloxquant::cuda
