// Lazy MLX operations over the core: everything is checked here, when the graph is built.
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "src/mlx/primitives.h"
#include "src/mlx/snapshot.h"

namespace veloxquant {

struct AttendOptions {
  float scale = 1.0f;
  bool causal = false;
  int64_t sliding_window = 0;
  float logit_softcap = 0.0f;
  std::optional<mlx::core::array> mask;   // bool or float, broadcastable to [B, H_q, L_q, length]
  std::optional<mlx::core::array> sinks;  // [H_q] logits
};

// q: [B, H_q, L_q, D]; the queries are the last L_q positions. Returns (out in the dtype of q,
// log-sum-exp fp32 [B, H_q, L_q]).
std::pair<mlx::core::array, mlx::core::array> attend_op(const mlx::core::array& q,
                                                        const Snapshot& keys,
                                                        const Snapshot& values,
                                                        const AttendOptions& options,
                                                        mlx::core::StreamOrDevice s = {});

// [B, H, length, D] in snapshot.dtype: the dense form, counted (dequantize_calls).
mlx::core::array dequantize_op(const Snapshot& snapshot, mlx::core::StreamOrDevice s = {});

// x: dense floats [B, H, length, D] in the layout of `like` (exact codec), so that dense values can
// be attended beside encoded keys.
Snapshot exact_like(const Snapshot& like, const mlx::core::array& x,
                    mlx::core::StreamOrDevice s = {});

// uint32 [1]: the CRC-32 of the text, the dtypes and shapes, and the bytes of the arrays. Lazy, and
// takes no memory: a state carries it, and states are evaluated often.
mlx::core::array checksum_op(const std::string& text, const std::vector<mlx::core::array>& arrays,
                             mlx::core::StreamOrDevice s = {});

// Outputs of CacheAppend, see primitives.h.
std::vector<mlx::core::array> append_op(
    const mlx::core::array& keys, const mlx::core::array& values,
    const mlx::core::array& exact_keys, const mlx::core::array& exact_values,
    const SharedCodec& key_codec, const SharedCodec& value_codec, const CacheGeometry& geometry,
    const AppendPlan& plan, const Counter& nonfinite, mlx::core::StreamOrDevice s = {});

}  // namespace veloxquant
