// A codec as the GPU kernels see it: its packed format, the launches that encode and decode its
// blocks, and the arrays that all are given. Made once for a codec, from memory: a step of a cache
// adds no operation for them.
#pragma once

#include <mlx/array.h>

#include <functional>
#include <optional>
#include <string>
#include <variant>

#include "src/attention/kernel_calls.h"
#include "src/mlx/codec_arrays.h"
#include "src/mlx/gpu_launch.h"

namespace veloxquant {

struct GpuCodec {
  attention::CodeFormat format;
  int transform = 0;  // of DecodeShape
  // As first_pass_call and second_pass_call name them: smooth, k_tables or v_tables, inverse.
  mlx::core::array smooth, tables, inverse;
  // Transform 2: queries times it are q_codes. fp32 [1 or H, D, rows].
  std::optional<mlx::core::array> query_matrix;

  // Tokens [B, H, n, D] to u8 blocks [B, H, ceil(n / 64), bytes], and those back to fp32, all 64;
  // the first token is at `position`.
  using Step = std::function<mlx::core::array(const mlx::core::array& of, int64_t position,
                                              const GpuStream& gpu)>;
  Step encode, decode;
  int inverse_transform = 0;  // out of the decoded coordinates: inverse_rows_call, by `inverse`
};

// Or why there are no kernels of the codec.
using MaybeGpuCodec = std::variant<GpuCodec, std::string>;
const MaybeGpuCodec& gpu_codec(const CodecArrays& codec);

}  // namespace veloxquant
