// CommVQ as a Codec: checks what it is given, undoes and redoes RoPE, moves tiles in and out of the
// planes that the kernels use.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "src/codecs/commvq/kernels.h"
#include "src/codecs/commvq/planes.h"
#include "src/codecs/registry.h"
#include "src/math/bitpack.h"
#include "src/math/float16.h"
#include "veloxquant/commvq.h"

namespace veloxquant {
namespace commvq {
namespace {

class CommVQCodec final : public Codec {
 public:
  CommVQCodec(int n_kv_heads, const Rope& rope, const TensorView& codebook,
              const TensorView& weight)
      : heads_(n_kv_heads), dim_(rope.spec().head_dim), rope_(rope) {
    require(n_kv_heads >= 1, "[commvq] n_kv_heads: got ", n_kv_heads, ", wanted at least 1");
    require(dim_ >= 8 && dim_ <= 2 * kMaxPairs && dim_ % 8 == 0, "[commvq] head_dim: got ", dim_,
            ", wanted a multiple of 8 up to ", 2 * kMaxPairs);
    tables_.n_pairs = dim_ / 2;
    tables_.n_stages = static_cast<int>(codebook.shape[1]);
    tables_.n_entries = static_cast<int>(codebook.shape[2]);
    tables_.codebook = static_cast<const uint16_t*>(codebook.data);
    require(codebook.shape[1] >= 1 && codebook.shape[1] <= kMaxStages, "[commvq] codebook: got ",
            codebook.shape[1], " stages, wanted 1..", kMaxStages);
    require(codebook.shape[2] >= 2 && codebook.shape[2] <= kMaxEntries, "[commvq] codebook: got ",
            codebook.shape[2], " entries, wanted 2..", kMaxEntries);
    for (int64_t i = 0; i < codebook.size(); ++i) {
      require((tables_.codebook[i] & 0x7c00u) != 0x7c00u,
              "[commvq] codebook: got NaN or infinity, wanted finite entries");
    }
    weight_.assign(static_cast<size_t>(heads_) * tables_.n_pairs, 1.0f);
    if (!weight.empty())
      std::copy_n(static_cast<const float*>(weight.data), weight_.size(), weight_.begin());
    for (float w : weight_) {
      require(std::isfinite(w) && w > 0.0f, "[commvq] weight: got ", w,
              ", wanted finite positive weights");
      inverse_weight_.push_back(1.0f / w);
    }
  }

  std::string name() const override {
    return "commvq " + std::to_string(tables_.n_stages) + "x" + std::to_string(tables_.n_entries) +
           "x" + std::to_string(tables_.n_entries);
  }
  Side side() const override { return Side::keys; }
  int n_kv_heads() const override { return heads_; }
  int head_dim() const override { return dim_; }
  int64_t block_bytes() const override { return commvq::block_bytes(tables_.n_stages); }

  void encode_block(Backend backend, const BlockPlace& place, const float* x, int n_tokens,
                    uint8_t* block) const override {
    std::vector<float> tile(static_cast<size_t>(dim_) * kBlockTokens, 0.0f), planes(tile.size());
    for (int t = 0; t < n_tokens; ++t) {
      for (int d = 0; d < dim_; ++d) tile[d * kBlockTokens + t] = x[t * dim_ + d];
    }
    rope_.turn_tile(backend, RopeDirection::inverse, place.position, tile.data());
    to_planes(rope_, weight_.data() + place.kv_head * tables_.n_pairs, tile.data(), planes.data());
    kernels_of(backend).encode_tile(head(place), planes.data(), block);
  }

  void decode_block(Backend backend, const BlockPlace& place, const uint8_t* block, int n_tokens,
                    float* y, int64_t y_stride) const override {
    std::vector<float> tile(static_cast<size_t>(dim_) * kBlockTokens);
    decode_block_transposed(backend, place, block, n_tokens, tile.data());
    for (int t = 0; t < n_tokens; ++t) {
      for (int d = 0; d < dim_; ++d) y[t * y_stride + d] = tile[d * kBlockTokens + t];
    }
  }

  void decode_block_transposed(Backend backend, const BlockPlace& place, const uint8_t* block,
                               int n_tokens, float* y_t) const override {
    std::vector<float> planes(static_cast<size_t>(dim_) * kBlockTokens);
    kernels_of(backend).decode_tile(head(place), block, planes.data());
    from_planes(rope_, inverse_weight_.data() + place.kv_head * tables_.n_pairs, planes.data(),
                y_t);
    rope_.turn_tile(backend, RopeDirection::forward, place.position, y_t);
    for (int d = 0; d < dim_ && n_tokens < kBlockTokens; ++d) {
      std::fill(y_t + d * kBlockTokens + n_tokens, y_t + (d + 1) * kBlockTokens, 0.0f);
    }
  }

  // Decoding ends where the model's keys are: neither queries nor keys move.
  void transform_query(int, float*, int64_t) const override {}
  void inverse(int, float*, int64_t) const override {}
  void forward(int, float*, int64_t) const override {}

  int64_t token_bytes() const override { return packed_bytes(tables_.n_stages, kCodeBits) + 2; }
  int64_t scalar_bytes() const override { return 2; }

  void unpack_tokens(const uint8_t* block, int n_tokens, uint8_t* rows) const override {
    std::vector<uint16_t> codes(static_cast<size_t>(tables_.n_stages) * kBlockTokens);
    std::vector<uint16_t> row(tables_.n_stages);
    for (int r = 0; r < tables_.n_stages; ++r) {
      unpack_row(block + r * kRowBytes, codes.data() + r * kBlockTokens);
    }
    for (int t = 0; t < n_tokens; ++t) {
      for (int r = 0; r < tables_.n_stages; ++r) row[r] = codes[r * kBlockTokens + t];
      uint8_t* out = rows + t * token_bytes();
      pack_bits(row.data(), tables_.n_stages, kCodeBits, out);
      std::memcpy(out + token_bytes() - 2, block + tables_.n_stages * kRowBytes + 2 * t, 2);
    }
  }

  void pack_tokens(const uint8_t* rows, int n_tokens, uint8_t* block) const override {
    std::memset(block, 0, block_bytes());
    std::vector<uint16_t> codes(static_cast<size_t>(tables_.n_stages) * kBlockTokens, 0);
    std::vector<uint16_t> row(tables_.n_stages);
    for (int t = 0; t < n_tokens; ++t) {
      const uint8_t* in = rows + t * token_bytes();
      unpack_bits(in, tables_.n_stages, kCodeBits, row.data());
      for (int r = 0; r < tables_.n_stages; ++r) codes[r * kBlockTokens + t] = row[r];
      std::memcpy(block + tables_.n_stages * kRowBytes + 2 * t, in + token_bytes() - 2, 2);
    }
    for (int r = 0; r < tables_.n_stages; ++r) {
      pack_row(codes.data() + r * kBlockTokens, block + r * kRowBytes);
    }
  }

 private:
  HeadTables head(const BlockPlace& place) const {
    HeadTables tables = tables_;
    tables.codebook += place.kv_head * tables_.n_stages * tables_.stage_size();
    return tables;
  }

  int heads_;
  int dim_;
  Rope rope_;
  HeadTables tables_;
  std::vector<float> weight_, inverse_weight_;
};

void require_view(const TensorView& view, const char* name, DType dtype,
                  std::initializer_list<int64_t> shape, const std::string& wanted) {
  const int ndim = static_cast<int>(shape.size());
  bool fits = !view.empty() && view.dtype == dtype && view.ndim == ndim;
  int64_t dense = 1;
  for (int d = ndim - 1; fits && d >= 0; --d) {
    const int64_t size = shape.begin()[d];
    fits = (size < 0 || view.shape[d] == size) && (view.shape[d] == 1 || view.stride[d] == dense);
    dense *= view.shape[d];
  }
  std::string got = "[";
  for (int d = 0; d < view.ndim; ++d) got += (d ? ", " : "") + std::to_string(view.shape[d]);
  require(fits, "[commvq] ", name, ": got ", dtype_name(view.dtype), " ", got,
          "], wanted row-major ", dtype_name(dtype), " ", wanted);
}

}  // namespace
}  // namespace commvq

CodecPtr make_commvq_codec(int n_kv_heads, const Rope& rope, const TensorView& codebook,
                           const TensorView& weight) {
  const int pairs = rope.spec().head_dim / 2;
  const std::string heads_text = std::to_string(n_kv_heads), pairs_text = std::to_string(pairs);
  commvq::require_view(codebook, "codebook", DType::float16, {n_kv_heads, -1, -1, 2, pairs},
                       "[" + heads_text + ", stages, entries, 2, " + pairs_text + "]");
  if (!weight.empty()) {
    commvq::require_view(weight, "weight", DType::float32, {n_kv_heads, pairs},
                         "[" + heads_text + ", " + pairs_text + "]");
  }
  return std::make_shared<commvq::CommVQCodec>(n_kv_heads, rope, codebook, weight);
}

CodecPtr commvq_from_spec(const CodecSpec& spec, const CodecTables& tables) {
  require(spec.side == Side::keys,
          "[commvq] side: got values, wanted keys: RoPE turns keys alone (values: vecinfer)");
  SpecReader reader(spec, tables);
  const TensorView codebook = reader.table_or_empty("codebook");
  const TensorView weight = reader.table_or_empty("weight");
  const Rope rope(rope_from_spec(spec, reader));
  reader.finish();
  return make_commvq_codec(spec.n_kv_heads, rope, codebook, weight);
}

int commvq_stages(int head_dim, double bits) {
  require(head_dim >= 8 && std::isfinite(bits) && bits > 0.0, "[commvq] bits: got ", bits,
          " for head_dim ", head_dim, ", wanted a positive number and head_dim of at least 8");
  constexpr int kScalarBits = 16;
  const double stages = std::floor((bits * head_dim - kScalarBits) / commvq::kCodeBits);
  return static_cast<int>(std::clamp(stages, 1.0, static_cast<double>(commvq::kMaxStages)));
}

}  // namespace veloxquant
