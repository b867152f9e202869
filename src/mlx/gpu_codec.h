// A codec as the GPU kernels see it: its packed format, the launch that encodes its blocks, and the
// arrays that both are given. Made once for a codec, from memory: a step of a cache adds no
// operation for them.
#pragma once

#include <mlx/array.h>

#include <functional>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "src/attention/kernel_calls.h"
#include "src/mlx/codec_arrays.h"

namespace veloxquant {

struct GpuCodec {
  attention::CodeFormat format;
  int transform = 0;  // of DecodeShape
  // As first_pass_call and second_pass_call name them: smooth, k_tables or v_tables, inverse.
  mlx::core::array smooth, tables, inverse;
  // Transform 2: queries times it are q_codes. fp32 [1 or H, D, rows].
  std::optional<mlx::core::array> query_matrix;

  std::function<metal::Call(int batch, int n_tokens)> encode;
  std::vector<mlx::core::array> encode_inputs;  // behind the tokens
};

// Or why there are no kernels of the codec.
using MaybeGpuCodec = std::variant<GpuCodec, std::string>;
const MaybeGpuCodec& gpu_codec(const CodecArrays& codec);

}  // namespace veloxquant
