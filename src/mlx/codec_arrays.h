// A codec of the core together with the MLX arrays that hold its tables.
#pragma once

#include <mlx/array.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "veloxquant/codec_spec.h"

namespace veloxquant {

struct GpuCodecSlot;  // gpu_codec.cpp

// Immutable: caches, snapshots and pending operations share one.
struct CodecArrays {
  CodecSpec spec;
  std::map<std::string, mlx::core::array> arrays;  // evaluated, row-major, on the CPU
  CodecPtr core;                                   // over their memory

  int64_t nbytes() const;  // of the arrays

  // What gpu_codec() makes when a GPU first asks.
  mutable std::once_flag gpu_once;
  mutable std::shared_ptr<const GpuCodecSlot> gpu;
};

using SharedCodec = std::shared_ptr<const CodecArrays>;

// Throws Error where spec and arrays are not exactly what such a codec has.
SharedCodec make_codec_arrays(CodecSpec spec, std::map<std::string, mlx::core::array> arrays);

SharedCodec exact_codec_arrays(Side side, int n_kv_heads, int head_dim, DType dtype);

}  // namespace veloxquant
