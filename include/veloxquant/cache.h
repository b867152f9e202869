// The compressed KV cache of one attention layer.
//
// Positions [0, sinks) stay exact for ever. Blocks of 64 tokens follow, from position `sinks` on;
// a block is sealed (encoded, packed, never rewritten) as soon as all its tokens are at least
// `window` tokens old. What is not sealed is exact, in 16 bits, in a tail of fixed capacity:
//
//   positions   0 .. sinks-1 | sealed blocks of 64 ........ | tail: window .. window + 63 tokens
//   stored as   exact 16 bit | packed codes                 | exact 16 bit
//
// Keys and values are rounded to 16 bits before anything else, so that the bytes do not depend on
// how the tokens were chunked.
//
// Three layers: CacheGeometry (positions only), run_append (the data of one append, on buffers
// that the caller owns; MLX calls this), KvCache (owns its memory; C++ users call this).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "veloxquant/attention.h"
#include "veloxquant/codec.h"
#include "veloxquant/tensor_view.h"

namespace veloxquant {

// A run of sealed blocks: tokens [start, end()). Only the last block may be cut short (by trim).
struct PackedSpan {
  int64_t start = 0;
  int n_blocks = 0;
  int last_count = kBlockTokens;
  int64_t end() const { return start + kBlockTokens * (n_blocks - 1) + last_count; }
};

// What an append of n_new tokens does.
struct AppendPlan {
  int64_t first = 0;  // position of the first new token
  int64_t n_new = 0;
  int64_t tail_start = 0;       // before the append
  int64_t next_tail_start = 0;  // after it
  int n_sealed = 0;             // blocks [tail_start, tail_start + 64 * n_sealed) become packed
  bool extends_last_span = false;
  // Exact tokens stay in their slots, so that the append may write into the storage that is there.
  bool keeps_places() const { return n_sealed == 0; }
};

struct CacheGeometry {
  int window = 64;
  int sinks = 4;
  int64_t length = 0;
  int64_t tail_start = 0;  // first position of the tail (sinks while nothing is sealed)
  std::vector<PackedSpan> packed;

  CacheGeometry() = default;
  CacheGeometry(int window, int sinks);  // throws Error: window and sinks must be >= 0

  // Slots of the exact storage: position p < sinks is in slot p, tail position p in slot
  // sinks + (p - tail_start).
  int64_t exact_capacity() const { return sinks + window + kBlockTokens; }
  int64_t tail_count() const { return length > tail_start ? length - tail_start : 0; }
  int64_t exact_count() const { return (length < sinks ? length : sinks) + tail_count(); }

  AppendPlan plan_append(int64_t n_new) const;
  void commit(const AppendPlan& plan);
  // Forgets the last min(n, length) tokens; cuts into sealed blocks too, which then stay packed
  // with a smaller count. Returns the number of tokens forgotten.
  int64_t trim(int64_t n);
};

// Buffers of one append. Exact storage: [B, H_kv, exact_capacity, D], fp16 or bf16.
struct AppendBuffers {
  TensorView new_keys, new_values;      // [B, H_kv, n_new, D], any float dtype
  TensorView exact_keys, exact_values;  // before; empty views for an empty cache
  // After: no overlap with the above, or the same storage where plan.keeps_places().
  MutableTensorView next_exact_keys, next_exact_values;
  uint8_t* key_blocks = nullptr;  // [B][H_kv][n_sealed][key block bytes], null if n_sealed = 0
  uint8_t* value_blocks = nullptr;
};

// Writes what `plan` says. NaN becomes 0 and +-inf (and what overflows 16 bits) the largest finite
// value; returns how many elements were changed so. Slots that hold no token are written as 0,
// or left alone where the storage is the same before and after.
int64_t run_append(Backend backend, const CacheGeometry& geometry, const AppendPlan& plan,
                   const Codec& key_codec, const Codec& value_codec, const AppendBuffers& buffers);

struct KvCacheConfig {
  int batch = 1;
  int n_kv_heads = 0;
  int head_dim = 0;
  int window = 64;
  int sinks = 4;
  DType exact_dtype = DType::float16;
  CodecPtr key_codec, value_codec;
};

class KvCache {
 public:
  explicit KvCache(const KvCacheConfig& config);
  ~KvCache();
  KvCache(KvCache&&) noexcept;
  KvCache& operator=(KvCache&&) noexcept;

  // keys, values: [B, H_kv, n, D].
  void append(const TensorView& keys, const TensorView& values);

  // Attention of queries over the whole cache; the queries are the last q.shape[2] positions.
  void attend(const TensorView& q, const AttentionParams& params, const MutableTensorView& out,
              const MutableTensorView& lse) const;

  // append + attend in one step: the new tokens are seen exactly (or, strict, each query sees what
  // token-by-token decoding would show it).
  void append_and_attend(const TensorView& q, const TensorView& keys, const TensorView& values,
                         bool strict, const AttentionParams& params, const MutableTensorView& out,
                         const MutableTensorView& lse);

  int64_t trim(int64_t n);
  int64_t length() const;
  int64_t nbytes() const;     // bytes this cache holds: packed blocks + exact storage
  int64_t nonfinite() const;  // elements of keys and values that were not finite
  const CacheGeometry& geometry() const;
  KeyValueSource source() const;  // views into this cache, valid until the next append or trim

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace veloxquant
