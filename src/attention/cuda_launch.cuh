// One instance of the decode kernel and how it is launched; cuda_<dim>.cu instantiate it.
#pragma once

#include "src/attention/cuda_decode.cuh"
#include "src/backends/cuda/check.h"

namespace veloxquant::attention::cuda {

struct Choice {
  Kind keys, values;
  bool by_lane;
  int heads;  // 4 or 8
};

// A kernel may start before the one ahead of it on the stream has ended; it waits for it itself.
inline cudaLaunchAttribute overlap_attribute() {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// One CTA fills a multiprocessor: its tables are shared by as many warps as registers allow.
template <class S>
void launch(DecodeParams params, const backends::Device& device, cudaStream_t stream) {
  const int merge = S::merge_bytes(params.head_dim);
  int shared = S::kTableBytes + S::kFixedBytes + merge;
  params.merge_over_tables = 0;
  if (shared > device.shared_per_block) {
    params.merge_over_tables = merge > S::kTableBytes ? merge : S::kTableBytes;
    shared = params.merge_over_tables + S::kFixedBytes;
  }
  require(shared <= device.shared_per_block, "[decode_attention] shared memory: got a device with ",
          device.shared_per_block, " bytes a block, wanted ", shared, " for this format");
  const auto kernel = decode_kernel<S>;
  backends::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
                  "decode_attention");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(params.n_ctas);
  config.blockDim = dim3(32 * S::WARPS);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute = overlap_attribute();
  config.attrs = &attribute;
  config.numAttrs = device.major >= 9 ? 1 : 0;
  backends::check(cudaLaunchKernelEx(&config, kernel, params), "decode_attention");
}

using Launcher = void (*)(DecodeParams params, const backends::Device& device, cudaStream_t stream);

template <Kind kKey, Kind kValue, bool kByLane, int DIM>
Launcher find_heads(int heads) {
  return heads == 4 ? launch<Shape<kKey, kValue, 4, kByLane, DIM>>
                    : launch<Shape<kKey, kValue, 8, kByLane, DIM>>;
}

// DIM: 64, 96, 128 or 256, the head_dim or what it is padded to.
template <int DIM, bool kByLane>
Launcher find_launcher(const Choice& c) {
  if (c.keys == kHalf2) {
    return c.values == kHalf2 ? find_heads<kHalf2, kHalf2, kByLane, DIM>(c.heads)
                              : find_heads<kHalf2, kInt8, kByLane, DIM>(c.heads);
  }
  return c.values == kHalf2 ? find_heads<kInt8, kHalf2, kByLane, DIM>(c.heads)
                            : find_heads<kInt8, kInt8, kByLane, DIM>(c.heads);
}

Launcher launcher_64(const Choice& choice);
Launcher launcher_96(const Choice& choice);
Launcher launcher_128(const Choice& choice);
Launcher launcher_256(const Choice& choice);

}  // namespace veloxquant::attention::cuda
