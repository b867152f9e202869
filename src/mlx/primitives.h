// The lazy operations over the core. Built by ops.h, which validates; these only run.
#pragma once

#include <mlx/primitives.h>

#include <atomic>
#include <memory>

#include "src/mlx/snapshot.h"
#include "veloxquant/cache.h"

namespace veloxquant {

// Counts elements that were not finite; shared by a cache and its pending appends.
using Counter = std::shared_ptr<std::atomic<int64_t>>;

class CpuPrimitive : public mlx::core::Primitive {
 public:
  using Primitive::Primitive;
  void eval_gpu(const std::vector<mlx::core::array>&, std::vector<mlx::core::array>&) override;
};

// inputs: keys, values, exact keys, exact values.
// outputs: next exact keys and values; with sealed blocks also u8 [B, H, n_sealed, block bytes] of
// keys and of values.
class CacheAppend : public CpuPrimitive {
 public:
  CacheAppend(mlx::core::Stream stream, SharedCodec keys, SharedCodec values,
              CacheGeometry geometry, AppendPlan plan, Counter nonfinite);
  void eval_cpu(const std::vector<mlx::core::array>& inputs,
                std::vector<mlx::core::array>& outputs) override;
  const char* name() const override { return "VeloxQuantCacheAppend"; }

 private:
  SharedCodec keys_, values_;
  CacheGeometry geometry_;
  AppendPlan plan_;
  Counter nonfinite_;
};

// inputs: q, key snapshot, value snapshot, mask?, sink logits?. outputs: out, log-sum-exp.
class CacheAttend : public CpuPrimitive {
 public:
  struct Spec {
    SnapshotLayout layout;
    SharedCodec keys, values;
    bool has_exact = false, has_chunk = false, has_mask = false, has_sinks = false;
    int64_t n_key_inputs = 0, n_value_inputs = 0;
    AttentionParams params;
  };
  CacheAttend(mlx::core::Stream stream, Spec spec);
  void eval_cpu(const std::vector<mlx::core::array>& inputs,
                std::vector<mlx::core::array>& outputs) override;
  const char* name() const override { return "VeloxQuantCacheAttend"; }

 private:
  Spec spec_;
};

// inputs: a snapshot. output: [B, H, length, D] in the original coordinates.
class CacheDequantize : public CpuPrimitive {
 public:
  CacheDequantize(mlx::core::Stream stream, SnapshotLayout layout, SharedCodec codec,
                  bool has_exact, bool has_chunk);
  void eval_cpu(const std::vector<mlx::core::array>& inputs,
                std::vector<mlx::core::array>& outputs) override;
  const char* name() const override { return "VeloxQuantCacheDequantize"; }

 private:
  SnapshotLayout layout_;
  SharedCodec codec_;
  bool has_exact_, has_chunk_;
};

// inputs: arrays, row-major. output: uint32 [1], the CRC-32 that starts at text_crc and goes over
// their bytes.
class Checksum : public CpuPrimitive {
 public:
  Checksum(mlx::core::Stream stream, uint32_t text_crc);
  void eval_cpu(const std::vector<mlx::core::array>& inputs,
                std::vector<mlx::core::array>& outputs) override;
  const char* name() const override { return "VeloxQuantChecksum"; }

 private:
  uint32_t text_crc_;
};

}  // namespace veloxquant
