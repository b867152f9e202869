// A cache's append and attention of few tokens (a decode step) on the GPU, out of the core's
// kernels and MLX's own operations. Bytes are those of run_append, attention is within tolerance of
// attend.
#pragma once

#include <mlx/array.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "src/mlx/gpu_launch.h"
#include "src/mlx/ops.h"
#include "src/mlx/snapshot.h"

namespace veloxquant {

constexpr int kGpuQueries = 16;  // more at a time are prefill: the CPU's tiles, so far
constexpr int kGpuSpans = 4;     // a Metal function takes 31 buffers: longer spans instead of more

// Why these codecs' decode steps do not run on a GPU; nothing where they do.
std::optional<std::string> no_gpu_cache_because(const CodecArrays& keys, const CodecArrays& values);

struct GpuAppend {
  // As CacheAppend's: exact keys, exact values, with sealed blocks those of keys and of values.
  std::vector<mlx::core::array> outputs;
  mlx::core::array nonfinite;  // int32, elements of both that were not finite
};
GpuAppend append_on_gpu(const mlx::core::array& keys, const mlx::core::array& values,
                        const mlx::core::array& exact_keys, const mlx::core::array& exact_values,
                        const CodecArrays& key_codec, const CodecArrays& value_codec,
                        const CacheGeometry& geometry, const AppendPlan& plan,
                        const GpuStream& gpu);

// mask: float or bool [B, H_q, L_q, length], by strides. (out, log-sum-exp), or nothing and why in
// the debug log.
std::optional<std::pair<mlx::core::array, mlx::core::array>> attend_on_gpu(
    const mlx::core::array& q, const Snapshot& keys, const Snapshot& values,
    const AttendOptions& options, const std::optional<mlx::core::array>& mask,
    mlx::core::StreamOrDevice s);

}  // namespace veloxquant
