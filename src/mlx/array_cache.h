// The cache of one attention layer over immutable MLX arrays.
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

#include <optional>
#include <utility>
#include <vector>

#include "src/mlx/ops.h"
#include "src/mlx/snapshot.h"

namespace veloxquant {

class ArrayCache {
 public:
  // exact_dtype: float16 or bfloat16.
  ArrayCache(SharedCodec keys, SharedCodec values, int window, int sinks, DType exact_dtype);

  // Appends keys and values [B, H, n, D] lazily and returns what attention of the same step reads.
  // strict: each query sees as codes exactly what token-by-token decoding would show it.
  std::pair<Snapshot, Snapshot> update(const mlx::core::array& keys, const mlx::core::array& values,
                                       bool strict, mlx::core::StreamOrDevice s = {});

  // What the cache holds now, as attention outside an update reads it.
  std::pair<Snapshot, Snapshot> snapshot() const;

  int64_t trim(int64_t n, mlx::core::StreamOrDevice s = {});

  const CacheGeometry& geometry() const { return geometry_; }
  int64_t nbytes() const;  // packed spans + exact storage, codebooks not included
  int64_t nonfinite() const;

  // The whole state: arrays (exact keys, exact values, key spans, value spans; none while empty)
  // and positions (length, tail start, then start, blocks, last count of each span).
  std::vector<mlx::core::array> arrays() const;
  std::vector<int64_t> positions() const;
  // The same arrays with the spans in interchange order, u8 [B, H, tokens, token bytes]; for
  // files, evaluated here.
  std::vector<mlx::core::array> interchange_arrays() const;
  // Throws Error where the two do not describe a cache of these codecs, window and sinks.
  void restore(const std::vector<mlx::core::array>& arrays, const std::vector<int64_t>& positions,
               bool interchange = false);

 private:
  struct Exact {
    mlx::core::array keys, values;
  };
  Snapshot side(const SharedCodec& codec, const std::vector<mlx::core::array>& spans,
                const std::optional<Exact>& exact, bool keys) const;
  void store(std::vector<mlx::core::array>& spans, const mlx::core::array& blocks, bool extend,
             const mlx::core::Stream& stream);
  void merge_spans(const mlx::core::Stream& stream);

  SharedCodec keys_, values_;
  DType exact_dtype_;
  CacheGeometry geometry_;
  std::optional<Exact> exact_;  // none before the first update
  std::vector<mlx::core::array> key_spans_, value_spans_;
  mlx::core::Dtype key_dtype_ = mlx::core::float32, value_dtype_ = mlx::core::float32;
  int batch_ = 1;
  Counter nonfinite_;
  std::optional<mlx::core::array> gpu_nonfinite_;  // int32: what appends on a GPU counted
};

}  // namespace veloxquant
