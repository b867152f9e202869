// One instance of the decode kernel and how it is launched; cuda_<dim>.cu instantiate it.
#pragma once

#include "src/attention/cuda_decode.cuh"
#include "src/backends/cuda/start.cuh"

namespace veloxquant::attention::cuda {

struct Choice {
  Kind keys, values;
  bool by_lane;
  int heads;  // 4 or 8
};

// One CTA fills a multiprocessor: its tables are shared by as many warps as registers allow.
template <class S>
void launch(DecodeParams params, const backends::Device& device, cudaStream_t stream) {
  constexpr int kFixed = Shared<S>::kFixedBytes;
  const int rows = Shared<S>::rows_bytes(params.head_dim);
  int shared = S::kTableBytes + kFixed + rows;
  params.merge_over_tables = 0;
  if (shared > device.shared_per_block) {
    params.merge_over_tables = rows > S::kTableBytes ? rows : S::kTableBytes;
    shared = params.merge_over_tables + kFixed;
  }
  require(shared <= device.shared_per_block, "[decode_attention] shared memory: got a device with ",
          device.shared_per_block, " bytes a block, wanted ", shared, " for this format");
  const int matrix = 4 * params.head_dim * params.head_dim;
  const bool dense = params.keys.matrix != nullptr || params.values.matrix != nullptr;
  params.matrix_in_shared = dense && shared + matrix <= device.shared_per_block;
  if (params.matrix_in_shared) shared += matrix;
  backends::start_early(decode_kernel<S>, params, params.n_ctas, S::THREADS, shared, device, stream,
                        "decode_attention");
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
