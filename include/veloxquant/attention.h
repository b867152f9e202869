// One fused attention over what a cache holds: exact tokens and packed blocks.
//
// out = softmax(scale * q K^T + mask) V, computed in tiles of 64 tokens with an online softmax;
// the dequantised history is never materialised. Any codec plugs in through codec.h.
#pragma once

#include <cstdint>
#include <vector>

#include "veloxquant/codec.h"
#include "veloxquant/tensor_view.h"

namespace veloxquant {

// Consecutive packed blocks, tokens [start, start + 64 * (n_blocks - 1) + last_count).
// keys/values: first byte of [B][H_kv][n_blocks][block_bytes]; strides in bytes.
struct PackedRun {
  const uint8_t* keys = nullptr;
  const uint8_t* values = nullptr;
  int64_t key_batch_stride = 0, key_head_stride = 0;
  int64_t value_batch_stride = 0, value_head_stride = 0;
  int n_blocks = 0;
  int last_count = kBlockTokens;
  int64_t start = 0;

  int64_t end() const { return start + kBlockTokens * (n_blocks - 1) + last_count; }
};

// Consecutive exact tokens [start, start + keys.shape[2]); views [B, H_kv, n, D], last stride 1,
// fp32, fp16 or bf16. fp32 input is rounded to `round_to` before use (what the cache will keep).
struct ExactRun {
  TensorView keys;
  TensorView values;
  int64_t start = 0;
};

// Which form of a token a query sees where both exist. Blocks below `tail_start` are old: codes to
// every query. Blocks from `tail_start` on are new: their tokens are also in the exact runs, and a
// query at position t sees them as codes where they had left the window when t was appended
// (block end <= t + 1 - window; strict), or when the first query was (not strict).
// In short: packed tokens below code_end(t) are seen; of the exact tokens, those below tail_start
// (the sinks) and those from code_end(t) on.
struct Visibility {
  int64_t tail_start = 0;  // first token of the first new block
  int n_new_blocks = 0;    // blocks that exist in both forms
  int window = 64;
  bool strict = false;
  int64_t first_query = 0;  // position of the first query of the call that sealed them

  // Tokens in [tail_start, code_end(t)) are codes for a query at position t; from code_end(t) on
  // they are exact.
  int64_t code_end(int64_t position) const {
    int64_t t = strict ? position : first_query;
    int64_t n = (t + 1 - window - tail_start) / kBlockTokens;
    if (t + 1 - window < tail_start) n = 0;
    if (n > n_new_blocks) n = n_new_blocks;
    return tail_start + kBlockTokens * n;
  }
};

// What attention reads. Positions of packed and exact runs may overlap only as Visibility says;
// exact tokens below `visibility.tail_start` (the sinks) are always exact.
struct KeyValueSource {
  CodecPtr key_codec;  // null where there are no packed runs
  CodecPtr value_codec;
  std::vector<PackedRun> packed;       // ascending positions
  std::vector<ExactRun> exact;         // ascending positions
  DType exact_dtype = DType::float16;  // fp32 exact input is rounded to this
  Visibility visibility;
  int64_t length = 0;  // tokens in the cache, the queries' own included
};

struct AttentionMask {
  bool causal = false;
  int64_t sliding_window = 0;  // > 0: a query at t sees positions > t - sliding_window
  // Optional, broadcastable to [B, H_q, L_q, length] by strides of 0: boolean (true = visible),
  // or floating point, added to the scaled scores.
  TensorView array;
};

struct AttentionParams {
  float scale = 1.0f;
  AttentionMask mask;
  TensorView sink_logits;   // optional fp32 [H_q]: a learned logit that takes part in the softmax
  float logit_softcap = 0;  // > 0: scores become cap * tanh(score / cap) before the mask
  int64_t first_query_position = -1;  // -1: the queries are the last L_q positions
};

// q: [B, H_q, L_q, D], fp32/fp16/bf16, last stride 1; H_q a multiple of H_kv.
// out: [B, H_q, L_q, D] fp32/fp16/bf16. lse: fp32 [B, H_q, L_q], log-sum-exp of the scaled and
// masked scores, or empty. Rows that see nothing give out = 0 and lse = -inf; a
// query with a NaN or an infinity gives a row of NaN and no other row anything else.
// Deterministic; independent of the number of threads.
void attend(Backend backend, const TensorView& q, const KeyValueSource& source,
            const AttentionParams& params, const MutableTensorView& out,
            const MutableTensorView& lse);

// The oracle: fp64 over the dequantised tokens in the original coordinates. Slow, for tests.
void attend_oracle(const TensorView& q, const KeyValueSource& source, const AttentionParams& params,
                   const MutableTensorView& out, const MutableTensorView& lse);

// Which kernel `attend` runs for this source and that many query rows a KV head (queries x heads
// of its group), and why not a faster one. "cpu/AVX2 codes (vecinfer d4x256: register look-ups)":
// on the codes; "cpu/AVX2 tiles (vecinfer d3x16: no kernel on these codes)": tiles are decoded.
std::string attention_kernel_name(Backend backend, const KeyValueSource& source,
                                  int64_t n_query_rows = 1);

}  // namespace veloxquant
