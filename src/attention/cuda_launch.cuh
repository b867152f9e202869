// One instance of the decode kernel and how it is launched; cuda_<dim>.cu instantiate it.
#pragma once

#include "src/attention/cuda_decode.cuh"
#include "src/backends/cuda/start.cuh"

namespace veloxquant::attention::cuda {

struct Choice {
  Kind keys, values;
  bool by_lane;
  int heads;  // 4 or 8
  bool bf16;  // exact tokens
};

template <class S>
int shared_bytes(int limit, bool dense) {
  return limit == shared_limit(900)   ? Layout<S, shared_limit(900)>::bytes(dense)
         : limit == shared_limit(800) ? Layout<S, shared_limit(800)>::bytes(dense)
                                      : Layout<S, shared_limit(0)>::bytes(dense);
}

// One CTA fills a multiprocessor: its tables are shared by as many warps as registers allow.
template <class S>
void launch(const DecodeParams& params, const backends::Device& device, cudaStream_t stream) {
  const bool dense = params.keys.matrix != nullptr || params.values.matrix != nullptr;
  const int shared =
      shared_bytes<S>(shared_limit(backends::code_architecture(decode_kernel<S>)), dense);
  require(shared <= device.shared_per_block, "[decode_attention] shared memory: got a device with ",
          device.shared_per_block, " bytes a block, wanted ", shared, " for this format");
  backends::start_early(decode_kernel<S>, params, params.n_ctas, S::THREADS, shared, device, stream,
                        "decode_attention");
}

using Launcher = void (*)(const DecodeParams& params, const backends::Device& device,
                          cudaStream_t stream);

template <Kind kKey, Kind kValue, bool kByLane, int DIM>
Launcher find_heads(const Choice& c) {
  if (c.heads == 4) {
    return c.bf16 ? launch<Shape<kKey, kValue, 4, kByLane, DIM, true>>
                  : launch<Shape<kKey, kValue, 4, kByLane, DIM, false>>;
  }
  return c.bf16 ? launch<Shape<kKey, kValue, 8, kByLane, DIM, true>>
                : launch<Shape<kKey, kValue, 8, kByLane, DIM, false>>;
}

// DIM: 64, 96, 128 or 256, the head_dim or what it is padded to.
template <int DIM, bool kByLane>
Launcher find_launcher(const Choice& c) {
  if (c.keys == kHalf2) {
    return c.values == kHalf2 ? find_heads<kHalf2, kHalf2, kByLane, DIM>(c)
                              : find_heads<kHalf2, kInt8, kByLane, DIM>(c);
  }
  return c.values == kHalf2 ? find_heads<kInt8, kHalf2, kByLane, DIM>(c)
                            : find_heads<kInt8, kInt8, kByLane, DIM>(c);
}

Launcher launcher_64(const Choice& choice);
Launcher launcher_96(const Choice& choice);
Launcher launcher_128(const Choice& choice);
Launcher launcher_256(const Choice& choice);

}  // namespace veloxquant::attention::cuda
