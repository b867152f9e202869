// CommVQ (arXiv 2506.18879): keys before RoPE as sums of centres that commute with it.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "veloxquant/codec.h"
#include "veloxquant/rope.h"
#include "veloxquant/tensor_view.h"

namespace veloxquant {

// Keys only. Sizes: H = n_kv_heads, P = head_dim / 2 pairs in the order of rope.pairs().
// codebook: fp16 [H, R, N, 2, P]: R stages (1..64) of N entries (2..64), x of all pairs, then y.
// weight: fp32 [H, P], positive: errors of pair j count weight^2; empty means 1.
// Views must stay alive as long as the codec. Throws Error on any mismatch.
CodecPtr make_commvq_codec(int n_kv_heads, const Rope& rope, const TensorView& codebook,
                           const TensorView& weight);

// Stages that fit `bits` per element of head_dim, the scalar of each token included; at least 1.
int commvq_stages(int head_dim, double bits);

struct CommVQParams {
  int max_steps = 30;  // of EM per stage
  uint64_t seed = 0;
  // The temperature of the soft assignment falls from one to the other, as fractions of the mean
  // squared norm of what the stage has to encode.
  double hot = 1e-3;
  double cold = 1e-5;
};

struct CommVQReport {
  // Per KV head: sum |z - z^|^2 / sum |z|^2 over the training vectors after every stage, in the
  // metric of the weights.
  std::vector<std::vector<double>> relative_error;
};

// More training vectors than this are thinned to it.
constexpr int64_t kMaxCommVQVectors = 8192;

// Trains the codebook of one layer by EM on keys as the cache sees them. x: [H, N, D], RoPE
// applied, any float dtype; tokens with NaN or infinity are left out. positions: N of them.
// weight: as above. codebook: fp16 [H, R, N, 2, P]. Deterministic by seed, whatever the threads.
// `progress` (may be empty) is called from any thread with the fraction done.
CommVQReport train_commvq(const TensorView& x, const std::vector<int64_t>& positions,
                          const Rope& rope, const TensorView& weight, const CommVQParams& params,
                          const MutableTensorView& codebook,
                          const std::function<void(double)>& progress = {});

// The metric of the pairs: sqrt of the mean square of the queries in each pair, over its mean, at
// least 1e-3. RoPE keeps it. query_moments: E q_i^2, fp32 [H, D]. weight: fp32 [H, P].
void commvq_weight(const TensorView& query_moments, const Rope& rope,
                   const MutableTensorView& weight);

// Plain product and residual look-up followed by RoPE (halves layout), as one function:
//   g[t] = concatenation over m of sum over r of codebook[r, m, indices[t, r, m]]; out[t] =
//   RoPE(g[t])
// indices: int32 [n, R, M], clamped to the table. codebook: any float dtype [R, M, C, d], M d = D.
// positions: int32 [n]. inv_freq: fp32 [D / 2]. out: any float dtype [n, D]. Row-major.
void comm_vq_decode(Backend backend, const TensorView& indices, const TensorView& codebook,
                    const TensorView& positions, const TensorView& inv_freq,
                    const MutableTensorView& out);

}  // namespace veloxquant
