// One side (keys or values) of a cache at one moment: what attention reads, as MLX arrays.
#pragma once

#include <mlx/array.h>

#include <optional>
#include <vector>

#include "src/mlx/codec_arrays.h"
#include "veloxquant/cache.h"

namespace veloxquant {

// Positions and visibility; equal for keys and values of one cache.
struct SnapshotLayout {
  std::vector<PackedSpan> packed;
  int sinks = 0;
  // The exact storage (before the append that made this snapshot): tokens it held then.
  int64_t exact_length = 0;
  int64_t exact_tail_start = 0;
  int64_t chunk_start = 0;  // position of the first token of `chunk`
  int64_t length = 0;       // tokens in all
  Visibility visibility;
  DType exact_dtype = DType::float16;

  bool same_positions(const SnapshotLayout& other) const;
};

struct Snapshot {
  SharedCodec codec;
  SnapshotLayout layout;
  std::vector<mlx::core::array> spans;    // u8 [B, H, >= n_blocks, block bytes] per packed span
  std::optional<mlx::core::array> exact;  // 16 bit [B, H, capacity, D]
  std::optional<mlx::core::array> chunk;  // the newest tokens as given, [B, H, n, D]
  mlx::core::Dtype dtype = mlx::core::float32;  // of the keys or values as given
  int batch = 1;

  int64_t nbytes() const;  // spans + exact + chunk
  // Arrays in the order that source_over reads them.
  std::vector<mlx::core::array> inputs() const;
};

// The core's view of two sides, over evaluated arrays in the order of Snapshot::inputs():
// spans, exact?, chunk?.
KeyValueSource source_over(const SnapshotLayout& layout, const CodecPtr& key_codec,
                           const CodecPtr& value_codec, bool has_exact, bool has_chunk,
                           const mlx::core::array* key_inputs,
                           const mlx::core::array* value_inputs);

}  // namespace veloxquant
