// A Codec around VecInfer's: pairs go to their slots with RoPE undone, and come back with RoPE.
#include <algorithm>
#include <cmath>
#include <vector>

#include "src/codecs/registry.h"
#include "src/math/portable.h"
#include "veloxquant/vecinfer.h"
#include "veloxquant/vecinfer_rope.h"

namespace veloxquant {
namespace {

class VecInferRopeCodec final : public Codec {
 public:
  VecInferRopeCodec(const Rope& rope, CodecPtr inner, const TensorView& order,
                    const TensorView& weight)
      : rope_(rope), inner_(std::move(inner)), pairs_(rope.spec().head_dim / 2) {
    const int heads = inner_->n_kv_heads();
    const auto* positions = static_cast<const int32_t*>(order.data);
    const auto* weights = static_cast<const float*>(weight.data);
    for (int h = 0; h < heads; ++h) {
      std::vector<bool> seen(pairs_, false);
      for (int k = 0; k < pairs_; ++k) {
        const int32_t j = positions[h * pairs_ + k];
        require(j >= 0 && j < pairs_ && !seen[j], "[vecinfer_rope] order: got ", j,
                " out of place in head ", h, ", wanted each of 0..", pairs_ - 1, " once");
        seen[j] = true;
        const float w = weights[h * pairs_ + j];
        require(std::isfinite(w) && w > 0.0f, "[vecinfer_rope] weight: got ", w,
                ", wanted finite positive weights");
        slots_.push_back({rope_.pairs()[j], w, 1.0f / w});
      }
    }
  }

  std::string name() const override { return inner_->name() + ", RoPE pairs"; }
  Side side() const override { return Side::keys; }
  int n_kv_heads() const override { return inner_->n_kv_heads(); }
  int head_dim() const override { return inner_->head_dim(); }
  int64_t n_sequences() const override { return inner_->n_sequences(); }
  int64_t block_bytes() const override { return inner_->block_bytes(); }

  void encode_block(Backend backend, const BlockPlace& place, const float* x, int n_tokens,
                    uint8_t* block) const override {
    const int dims = head_dim();
    std::vector<float> rows(x, x + int64_t{n_tokens} * dims), slotted(rows.size());
    std::vector<int64_t> positions(n_tokens);
    for (int t = 0; t < n_tokens; ++t) positions[t] = place.position + t;
    rope_.turn_rows(backend, RopeDirection::inverse, positions.data(), n_tokens, rows.data(), dims);
    const Slot* slots = slots_.data() + int64_t{place.kv_head} * pairs_;
    for (int t = 0; t < n_tokens; ++t) {
      const float* row = rows.data() + int64_t{t} * dims;
      float* out = slotted.data() + int64_t{t} * dims;
      for (int k = 0; k < pairs_; ++k) {
        out[2 * k] = mul(row[slots[k].pair.first], slots[k].weight);
        out[2 * k + 1] = mul(row[slots[k].pair.second], slots[k].weight);
      }
    }
    inner_->encode_block(backend, place, slotted.data(), n_tokens, block);
  }

  void decode_block(Backend backend, const BlockPlace& place, const uint8_t* block, int n_tokens,
                    float* y, int64_t y_stride) const override {
    const int dims = head_dim();
    std::vector<float> tile(int64_t{dims} * kBlockTokens);
    decode_block_transposed(backend, place, block, n_tokens, tile.data());
    for (int t = 0; t < n_tokens; ++t) {
      for (int d = 0; d < dims; ++d) y[t * y_stride + d] = tile[d * kBlockTokens + t];
    }
  }

  void decode_block_transposed(Backend backend, const BlockPlace& place, const uint8_t* block,
                               int n_tokens, float* y_t) const override {
    std::vector<float> slotted(int64_t{head_dim()} * kBlockTokens);
    // Absent tokens decode to zeros, which RoPE leaves zeros.
    inner_->decode_block_transposed(backend, place, block, n_tokens, slotted.data());
    const Slot* slots = slots_.data() + int64_t{place.kv_head} * pairs_;
    for (int k = 0; k < pairs_; ++k) {
      const float* from = slotted.data() + int64_t{2} * k * kBlockTokens;
      float* first = y_t + int64_t{slots[k].pair.first} * kBlockTokens;
      float* second = y_t + int64_t{slots[k].pair.second} * kBlockTokens;
      for (int t = 0; t < kBlockTokens; ++t) {
        first[t] = mul(from[t], slots[k].inverse_weight);
        second[t] = mul(from[kBlockTokens + t], slots[k].inverse_weight);
      }
    }
    rope_.turn_tile(backend, RopeDirection::forward, place.position, y_t);
    // RoPE of 0 may be -0.
    for (int d = 0; d < head_dim() && n_tokens < kBlockTokens; ++d) {
      std::fill(y_t + int64_t{d} * kBlockTokens + n_tokens, y_t + int64_t{d + 1} * kBlockTokens,
                0.0f);
    }
  }

  // Decoding ends where the model's keys are: neither queries nor keys move.
  void transform_query(int, float*, int64_t) const override {}
  void inverse(int, float*, int64_t) const override {}
  void forward(int, float*, int64_t) const override {}

  int64_t token_bytes() const override { return inner_->token_bytes(); }
  void unpack_tokens(const uint8_t* block, int n_tokens, uint8_t* rows) const override {
    inner_->unpack_tokens(block, n_tokens, rows);
  }
  void pack_tokens(const uint8_t* rows, int n_tokens, uint8_t* block) const override {
    inner_->pack_tokens(rows, n_tokens, block);
  }

 private:
  struct Slot {
    RopePair pair;
    float weight, inverse_weight;
  };

  Rope rope_;
  CodecPtr inner_;
  int pairs_;
  std::vector<Slot> slots_;  // [H][P]
};

void require_view(const TensorView& view, const char* name, DType dtype, int heads, int pairs) {
  const bool fits = !view.empty() && view.dtype == dtype && view.ndim == 2 &&
                    view.shape[0] == heads && view.shape[1] == pairs &&
                    (pairs == 1 || view.stride[1] == 1) && (heads == 1 || view.stride[0] == pairs);
  require(fits, "[vecinfer_rope] ", name, ": got ", dtype_name(view.dtype), " with ", view.ndim,
          " dimensions, wanted row-major ", dtype_name(dtype), " [", heads, ", ", pairs, "]");
}

}  // namespace

CodecPtr make_vecinfer_rope_codec(int n_kv_heads, const Rope& rope, int n_subvectors,
                                  const TensorView& tables, const TensorView& order,
                                  const TensorView& weight) {
  const int dims = rope.spec().head_dim;
  require(n_subvectors >= 1 && dims % (2 * n_subvectors) == 0, "[vecinfer_rope] n_subvectors: got ",
          n_subvectors, ", wanted a divisor of the ", dims / 2, " pairs");
  require_view(order, "order", DType::int32, n_kv_heads, dims / 2);
  require_view(weight, "weight", DType::float32, n_kv_heads, dims / 2);
  CodecPtr inner =
      make_vecinfer_codec(Side::keys, n_kv_heads, dims, n_subvectors, tables, Transform());
  return std::make_shared<VecInferRopeCodec>(rope, std::move(inner), order, weight);
}

CodecPtr vecinfer_rope_from_spec(const CodecSpec& spec, const CodecTables& tables) {
  require(spec.side == Side::keys,
          "[vecinfer_rope] side: got values, wanted keys: RoPE turns keys alone");
  SpecReader reader(spec, tables);
  const int n_subvectors = static_cast<int>(reader.integer("n_subvectors", 1, 1024));
  const Rope rope(rope_from_spec(spec, reader));
  const TensorView entries = reader.table_or_empty("tables");
  const TensorView order = reader.table_or_empty("order");
  const TensorView weight = reader.table_or_empty("weight");
  reader.finish();
  return make_vecinfer_rope_codec(spec.n_kv_heads, rope, n_subvectors, entries, order, weight);
}

}  // namespace veloxquant
