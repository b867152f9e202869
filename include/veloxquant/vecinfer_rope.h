// VecInfer on keys before RoPE: product quantisation of whole RoPE pairs. RoPE is undone at encode
// and redone, pair by pair, after the look-up.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "veloxquant/calibration.h"
#include "veloxquant/codec.h"
#include "veloxquant/rope.h"
#include "veloxquant/tensor_view.h"

namespace veloxquant {

// Keys only. Sizes: H = n_kv_heads, P = head_dim / 2 pairs in the order of rope.pairs().
// tables: as make_vecinfer_codec takes them, d even: fp16 [H, M or 1, C, d].
// order: int32 [H, P], a permutation per head: sub-vector m holds pairs order[m * d / 2 ...].
// weight: fp32 [H, P], positive: errors of pair j count weight^2.
// Views must stay alive as long as the codec. Throws Error on any mismatch.
CodecPtr make_vecinfer_rope_codec(int n_kv_heads, const Rope& rope, int n_subvectors,
                                  const TensorView& tables, const TensorView& order,
                                  const TensorView& weight);

// Trains the tables of one layer. x: [H, N, D], RoPE applied, any float dtype; positions: N of
// them. weight: as above (commvq_weight). order (written): pairs dealt out to the sub-vectors so
// that the volumes balance, by the covariance of each pair. tables: fp16 [H, M, C, D / M].
TableReport train_vecinfer_rope(const TensorView& x, const std::vector<int64_t>& positions,
                                const Rope& rope, const TensorView& weight, int n_subvectors,
                                const KMeansParams& params, const MutableTensorView& order,
                                const MutableTensorView& tables,
                                const std::function<void(double)>& progress = {});

}  // namespace veloxquant
