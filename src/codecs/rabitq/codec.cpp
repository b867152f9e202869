// RaBitQ as a Codec: rotates, subtracts the mean, moves tiles in and out of the kernels' layout.
#include <cmath>
#include <cstring>
#include <vector>

#include "src/codecs/rabitq/byte_codes.h"
#include "src/codecs/rabitq/format.h"
#include "src/codecs/registry.h"
#include "src/codecs/rotation.h"
#include "src/math/bitpack.h"
#include "src/math/finite.h"
#include "src/math/float16.h"
#include "veloxquant/rabitq.h"

namespace veloxquant {
namespace rabitq {
namespace {

int check_dim(int head_dim) {
  require(head_dim >= 8 && head_dim <= kMaxHeadDim && head_dim % 8 == 0, "[rabitq] head_dim: got ",
          head_dim, ", wanted a multiple of 8 up to ", kMaxHeadDim);
  return head_dim;
}

const char* const kScaleNames[] = {"unbiased", "reconstruction", "norm"};

class RabitqCodec final : public Codec {
 public:
  RabitqCodec(Side side, int n_kv_heads, int head_dim, const RabitqOptions& options)
      : side_(side),
        heads_(n_kv_heads),
        layout_{head_dim, options.bits},
        scale_(options.scale),
        rotation_(check_dim(head_dim), options.seed) {
    require(n_kv_heads >= 1, "[rabitq] n_kv_heads: got ", n_kv_heads, ", wanted at least 1");
    require(options.bits >= 1 && options.bits <= kMaxBits, "[rabitq] bits: got ", options.bits,
            ", wanted 1..", kMaxBits);
    const TensorView& mean = options.mean;
    if (mean.empty()) return;
    require(mean.dtype == DType::float32 && mean.ndim == 2 && mean.shape[0] == heads_ &&
                mean.shape[1] == head_dim && mean.stride[1] == 1,
            "[rabitq] mean: got ", dtype_name(mean.dtype), " with ", mean.ndim,
            " dimensions, wanted row-major float32 [", heads_, ", ", head_dim, "]");
    for (int h = 0; h < heads_; ++h) {
      const float* row = static_cast<const float*>(mean.at(h));
      for (int d = 0; d < head_dim; ++d) {
        require(std::isfinite(row[d]), "[rabitq] mean: got ", row[d], ", wanted finite values");
      }
      mean_.insert(mean_.end(), row, row + head_dim);
    }
    // What is subtracted are the rotated tokens' coordinates: on every backend the same numbers.
    rotation_.forward(Backend::reference, mean_.data(), heads_);
  }

  std::string name() const override { return "rabitq " + std::to_string(layout_.bits) + "-bit"; }
  Side side() const override { return side_; }
  int n_kv_heads() const override { return heads_; }
  int head_dim() const override { return layout_.head_dim; }
  int64_t block_bytes() const override { return layout_.bytes(); }

  void encode_block(Backend backend, const BlockPlace& place, const float* x, int n_tokens,
                    uint8_t* block) const override {
    const int dim = layout_.head_dim;
    std::vector<float> rows(x, x + static_cast<size_t>(n_tokens) * dim);
    rotation_.forward(backend, rows.data(), n_tokens);
    if (const float* mean = mean_of(place.kv_head)) {
      for (int t = 0; t < n_tokens; ++t) {
        for (int d = 0; d < dim; ++d) rows[t * dim + d] -= mean[d];
      }
    }
    std::vector<float> tile(static_cast<size_t>(dim) * kBlockTokens);
    to_tile(rows.data(), n_tokens, dim, tile.data());
    float squares[kBlockTokens], dots[kBlockTokens], levels[kBlockTokens], scalars[kBlockTokens];
    levels_of(backend).encode(tile.data(), dim, layout_.bits, block, squares, dots, levels);
    clear_tokens_from(n_tokens, static_cast<int64_t>(dim) * layout_.bits, block);
    for (int t = 0; t < kBlockTokens; ++t) {
      scalars[t] = level_scalar(static_cast<int>(scale_), squares[t], dots[t], levels[t]);
    }
    store_scalars(scalars, kBlockTokens, block + layout_.scalars_at());
  }

  void decode_block(Backend backend, const BlockPlace& place, const uint8_t* block, int n_tokens,
                    float* y, int64_t y_stride) const override {
    std::vector<float> tile(static_cast<size_t>(layout_.head_dim) * kBlockTokens);
    decode_block_transposed(backend, place, block, n_tokens, tile.data());
    from_tile(tile.data(), n_tokens, layout_.head_dim, y, y_stride);
  }

  void decode_block_transposed(Backend backend, const BlockPlace& place, const uint8_t* block,
                               int n_tokens, float* y_t) const override {
    float scalars[kBlockTokens];
    load_scalars(block + layout_.scalars_at(), kBlockTokens, scalars);
    levels_of(backend).decode(block, layout_.head_dim, layout_.bits, scalars,
                              mean_of(place.kv_head), y_t);
    if (n_tokens == kBlockTokens) return;
    for (int d = 0; d < layout_.head_dim; ++d) {
      std::fill(y_t + d * kBlockTokens + n_tokens, y_t + (d + 1) * kBlockTokens, 0.0f);
    }
  }

  // A mean adds <q, R c> to every score and R c to every value: such codecs decode tiles.
  std::string code_kernel(Backend backend) const override {
    if (backend == Backend::reference || !mean_.empty()) return {};
    return lookup::byte_code_kernel(bytes_with_factors(), side_);
  }
  std::unique_ptr<const CodeScores> code_scores(const BlockPlace&, const float* q,
                                                int n_rows) const override {
    return lookup::byte_code_scores(bytes_with_factors(), q, n_rows);
  }
  std::unique_ptr<CodeSums> code_sums(const BlockPlace&, int n_rows) const override {
    return lookup::byte_code_sums(bytes_with_factors(), n_rows);
  }

  void transform_query(int, float* q, int64_t n) const override {
    rotation_.forward(default_backend(), q, n);
  }
  void inverse(int, float* y, int64_t n) const override {
    rotation_.inverse(default_backend(), y, n);
  }
  void forward(int, float* x, int64_t n) const override {
    rotation_.forward(default_backend(), x, n);
  }

  int64_t token_bytes() const override {
    return packed_bytes(layout_.head_dim, layout_.bits) + static_cast<int64_t>(sizeof(uint16_t));
  }
  int64_t scalar_bytes() const override { return sizeof(uint16_t); }

  void unpack_tokens(const uint8_t* block, int n_tokens, uint8_t* rows) const override {
    std::vector<uint16_t> codes(layout_.head_dim);
    for (int t = 0; t < n_tokens; ++t) {
      uint8_t* row = rows + t * token_bytes();
      for (int d = 0; d < layout_.head_dim; ++d) {
        codes[d] = static_cast<uint16_t>(get_code(block, layout_.bits, d, t));
      }
      pack_bits(codes.data(), layout_.head_dim, layout_.bits, row);
      std::memcpy(row + token_bytes() - 2, block + layout_.scalars_at() + 2 * t, 2);
    }
  }

  void pack_tokens(const uint8_t* rows, int n_tokens, uint8_t* block) const override {
    std::memset(block, 0, static_cast<size_t>(block_bytes()));
    std::vector<uint16_t> codes(layout_.head_dim);
    for (int t = 0; t < n_tokens; ++t) {
      const uint8_t* row = rows + t * token_bytes();
      unpack_bits(row, layout_.head_dim, layout_.bits, codes.data());
      for (int d = 0; d < layout_.head_dim; ++d) {
        set_code(block, layout_.bits, d, t, codes[d]);
      }
      float scalar;
      load_scalars(row + token_bytes() - 2, 1, &scalar);
      store_scalars(&scalar, 1, block + layout_.scalars_at() + 2 * t);
    }
  }

 private:
  const float* mean_of(int kv_head) const {
    return mean_.empty() ? nullptr : mean_.data() + static_cast<int64_t>(kv_head) * head_dim();
  }

  lookup::ByteCodes bytes_with_factors() const {
    lookup::ByteCodes codes = byte_codes(layout_.head_dim, layout_.bits, layout_.bytes());
    codes.factors = [at = layout_.scalars_at()](const uint8_t* block, float* to) {
      load_scalars(block + at, kBlockTokens, to);
    };
    return codes;
  }

  Side side_;
  int heads_;
  BlockLayout layout_;
  RabitqScale scale_;
  Rotation rotation_;
  std::vector<float> mean_;  // rotated, [heads][dim]; empty: 0
};

}  // namespace

void store_scalars(const float* values, int n, uint8_t* bytes) {
  for (int i = 0; i < n; ++i) {
    uint32_t half = f32_to_f16(values[i]);
    const uint32_t magnitude = half & 0x7fffu;
    if (magnitude > 0x7c00u) half = 0;
    if (magnitude == 0x7c00u) half -= 1;
    bytes[2 * i] = static_cast<uint8_t>(half);
    bytes[2 * i + 1] = static_cast<uint8_t>(half >> 8);
  }
}

void load_scalars(const uint8_t* bytes, int n, float* values) {
  for (int i = 0; i < n; ++i) {
    values[i] = f16_to_f32(static_cast<uint16_t>(bytes[2 * i] | (bytes[2 * i + 1] << 8)));
  }
}

}  // namespace rabitq

CodecPtr make_rabitq_codec(Side side, int n_kv_heads, int head_dim, const RabitqOptions& options) {
  return std::make_shared<rabitq::RabitqCodec>(side, n_kv_heads, head_dim, options);
}

void rabitq_encode(Backend backend, const float* x, int64_t n, int dim, uint64_t seed,
                   uint8_t* codes, float* factors) {
  const Rotation rotation(rabitq::check_dim(dim), seed);
  parallel_ranges(n, kBlockTokens, [&](int64_t begin, int64_t end) {
    const int count = static_cast<int>(end - begin);
    std::vector<float> rows(x + begin * dim, x + end * dim);
    for (float& value : rows) value = finite_or_clamped(value);
    rotation.forward(backend, rows.data(), count);
    std::vector<float> tile(static_cast<size_t>(dim) * kBlockTokens);
    rabitq::to_tile(rows.data(), count, dim, tile.data());
    std::vector<uint8_t> planes(rabitq::plane_bytes(dim, 1));
    float squares[kBlockTokens], dots[kBlockTokens], levels[kBlockTokens];
    rabitq::levels_of(backend).encode(tile.data(), dim, 1, planes.data(), squares, dots, levels);
    rabitq::planes_to_rows(planes.data(), dim, count, codes + begin * (dim / 8), dim / 8);
    for (int t = 0; t < count; ++t) {
      factors[begin + t] = dots[t] > 0.0f ? squares[t] / dots[t] : 0.0f;
    }
  });
}

void rabitq_rotate(Backend backend, float* rows, int64_t n, int dim, uint64_t seed) {
  const Rotation rotation(rabitq::check_dim(dim), seed);
  rotation.forward(backend, rows, n);
}

CodecPtr rabitq_from_spec(const CodecSpec& spec, const CodecTables& tables) {
  SpecReader reader(spec, tables);
  RabitqOptions options;
  options.bits = static_cast<int>(reader.integer("bits", 1, rabitq::kMaxBits));
  options.scale = static_cast<RabitqScale>(reader.choice(
      "scale", {rabitq::kScaleNames[0], rabitq::kScaleNames[1], rabitq::kScaleNames[2]}));
  options.seed = static_cast<uint64_t>(reader.integer_or("seed", 0, 0, INT64_MAX));
  options.mean = reader.table_or_empty("mean");
  reader.finish();
  return make_rabitq_codec(spec.side, spec.n_kv_heads, spec.head_dim, options);
}

}  // namespace veloxquant
