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

}  // namespace veloxquant::cuda
