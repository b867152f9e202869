// The contract between codecs and everything above them (cache, attention, calibration).
//
// A codec compresses one side (keys or values) of one attention layer in blocks of 64 tokens.
// It works in its own coordinates, reached by a linear transform T of each KV head:
//   encode   y = T(x), y -> codes          decode   codes -> y^
//   score    q . x^  ==  transform_query(q) . y^         (keys: the query moves, not the history)
//   output   sum_t p_t x^_t  ==  inverse(sum_t p_t y^_t) (values: one inverse per output row)
// so attention never brings the history back into the original coordinates.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "veloxquant/backend.h"
#include "veloxquant/tensor_view.h"

namespace veloxquant {

constexpr int kBlockTokens = 64;

enum class Side { keys, values };

// Where a block belongs. `sequence` picks the tables of a batch row where tables carry a batch
// axis. `position` is that of the block's first token: codecs of pre-RoPE keys undo and redo the
// model's rotary embedding with it, all others ignore it.
struct BlockPlace {
  int sequence = 0;
  int kv_head = 0;
  int64_t position = 0;
};

// Attention on codes, for the few query rows of a decode step: what a codec offers that need not
// decode a token to use it (sums of table look-ups, say). Attention knows no more of it than this.
//
// Keys: prepared once from the query rows of a KV head, then read by several threads.
class CodeScores {
 public:
  virtual ~CodeScores() = default;
  // scores[r * stride + t] = q'_r . y^_t for the 64 * n_blocks tokens of consecutive blocks.
  // Tokens that a trimmed block no longer has get a finite number.
  virtual void score(const uint8_t* blocks, int n_blocks, float* scores, int64_t stride) const = 0;
};

// Values: a sum in the codec's own form, of one thread.
class CodeSums {
 public:
  virtual ~CodeSums() = default;
  // Adds weights[r * stride + t] y^_t of the tokens of consecutive blocks; weights are >= 0, and 0
  // for tokens that a trimmed block no longer has.
  virtual void add(const uint8_t* blocks, int n_blocks, const float* weights, int64_t stride) = 0;
  // y[r * y_stride + d] = the sums of row r; the next sum starts at 0.
  virtual void take(float* y, int64_t y_stride) = 0;
};

class Codec {
 public:
  virtual ~Codec() = default;

  // e.g. "vecinfer d4x256"
  virtual std::string name() const = 0;
  virtual Side side() const = 0;
  virtual int n_kv_heads() const = 0;
  virtual int head_dim() const = 0;
  // Sequences that have tables of their own; 1: all share the same.
  virtual int64_t n_sequences() const { return 1; }

  // Bytes of one packed block of 64 tokens of one KV head, everything per token included.
  virtual int64_t block_bytes() const = 0;
  // Payload bits per element: 8 * block_bytes / (64 * head_dim).
  double bits_per_element() const {
    return 8.0 * static_cast<double>(block_bytes()) / (kBlockTokens * head_dim());
  }

  // x: fp32 [n_tokens][head_dim], original coordinates, finite; 1 <= n_tokens <= 64.
  // block: block_bytes() bytes, all of them written. Equal on every backend and SIMD level.
  virtual void encode_block(Backend backend, const BlockPlace& place, const float* x, int n_tokens,
                            uint8_t* block) const = 0;

  // tokens [0, n_tokens) of a block -> y: fp32 [n_tokens][y_stride], codec coordinates.
  // Equal on every backend and SIMD level. Codes out of range are clamped.
  virtual void decode_block(Backend backend, const BlockPlace& place, const uint8_t* block,
                            int n_tokens, float* y, int64_t y_stride) const = 0;

  // The same, transposed: y_t [head_dim][64], tokens beyond n_tokens are 0.
  virtual void decode_block_transposed(Backend backend, const BlockPlace& place,
                                       const uint8_t* block, int n_tokens, float* y_t) const = 0;

  // Optional: attention on codes. The kernel's name, e.g. "register look-ups"; empty where there is
  // none, then attention decodes tiles of 64 tokens.
  virtual std::string code_kernel(Backend) const { return {}; }
  // For n_rows query rows of a KV head, where code_kernel() names one. q: fp32 [n_rows][head_dim],
  // transformed, scaled so that a weight is 2^score (e^ where logits are capped). `place` has no
  // position. An output row's relative L2 error by the kernel's arithmetic is at most 1e-3.
  virtual std::unique_ptr<const CodeScores> code_scores(const BlockPlace& /*place*/,
                                                        const float* /*q*/, int /*n_rows*/) const {
    return nullptr;
  }
  virtual std::unique_ptr<CodeSums> code_sums(const BlockPlace& /*place*/, int /*n_rows*/) const {
    return nullptr;
  }

  // Bytes of what code_scores and code_sums have made of the tables so far, and keep.
  virtual int64_t kept_bytes() const { return 0; }

  // In place on n rows of fp32 [n][head_dim]. Keys only: q -> q'.
  virtual void transform_query(int kv_head, float* q, int64_t n) const = 0;
  // In place on n rows of fp32 [n][head_dim]: codec coordinates -> original coordinates.
  virtual void inverse(int kv_head, float* y, int64_t n) const = 0;
  // In place: original -> codec coordinates, as encode does it.
  virtual void forward(int kv_head, float* x, int64_t n) const = 0;

  // Interchange order (files): token by token, whatever order the block keeps in memory. A token is
  // token_bytes() bytes: its codes one after the other, least significant bits first, zero bits up
  // to a whole byte, then its scalars (fp16, little-endian), if the codec has any.
  virtual int64_t token_bytes() const = 0;
  // Of these, bytes that are scalars; for reports.
  virtual int64_t scalar_bytes() const { return 0; }
  // rows: n_tokens * token_bytes()
  virtual void unpack_tokens(const uint8_t* block, int n_tokens, uint8_t* rows) const = 0;
  // Tokens that the block does not have are written as code 0, scalar 0.
  virtual void pack_tokens(const uint8_t* rows, int n_tokens, uint8_t* block) const = 0;
};

using CodecPtr = std::shared_ptr<const Codec>;

}  // namespace veloxquant
