// A cache's append and attention on the GPU, each a few launches of the core's kernels. Bytes are
// those of run_append, attention is within tolerance of attend.
#pragma once

#include <mlx/array.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "src/attention/kernel_calls.h"
#include "src/mlx/gpu_launch.h"
#include "src/mlx/ops.h"
#include "src/mlx/snapshot.h"

namespace veloxquant {

constexpr int kGpuSpans = 4;  // a Metal function takes 31 buffers: longer spans instead of more

// Attention's items for a GPU, and as the numbers that its kernels read.
std::vector<attention::Item> planned(const attention::DecodeShape& shape,
                                     const std::vector<attention::Item>& stretches, Gpu gpu);
std::vector<int32_t> plan_numbers(const std::vector<attention::Item>& items);

// Why caches of these codecs do not run on a GPU; nothing where they do.
std::optional<std::string> no_gpu_cache_because(const CodecArrays& keys, const CodecArrays& values);

struct GpuAppend {
  // As CacheAppend's: exact keys, exact values, with sealed blocks those of keys and of values.
  std::vector<mlx::core::array> outputs;
  mlx::core::array nonfinite;  // int32 [2, B H]: the given counts and this append's
};
GpuAppend append_on_gpu(const mlx::core::array& keys, const mlx::core::array& values,
                        const mlx::core::array& exact_keys, const mlx::core::array& exact_values,
                        const std::optional<mlx::core::array>& nonfinite,
                        const CodecArrays& key_codec, const CodecArrays& value_codec,
                        const CacheGeometry& geometry, const AppendPlan& plan,
                        const GpuStream& gpu);

// mask: float or bool [B, H_q, L_q, length], by strides. (out, log-sum-exp), or nothing and why in
// the debug log.
std::optional<std::pair<mlx::core::array, mlx::core::array>> attend_on_gpu(
    const mlx::core::array& q, const Snapshot& keys, const Snapshot& values,
    const AttendOptions& options, const std::optional<mlx::core::array>& mask,
    mlx::core::StreamOrDevice s);

// [B, H, length, D] in the original coordinates and the snapshot's dtype; nothing, and why in the
// debug log, as above.
std::optional<mlx::core::array> dequantize_on_gpu(const Snapshot& snapshot,
                                                  mlx::core::StreamOrDevice s);

}  // namespace veloxquant
