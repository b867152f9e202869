// Codes and scalars of 64 tokens in and out of the packed block.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "src/codecs/lookup/byte_codes.h"
#include "src/codecs/registry.h"
#include "src/codecs/rotation.h"
#include "src/codecs/turboquant/byte_codes.h"
#include "src/codecs/turboquant/scalar_codec.h"
#include "src/codecs/turboquant/sketch.h"
#include "src/math/row_sums.h"

namespace veloxquant {
namespace turboquant {
namespace {

class ScalarCodec final : public Codec {
 public:
  explicit ScalarCodec(const ScalarCodecParams& params)
      : params_(params), rotation_(checked_dim(params), params.seed) {
    const int dim = params.head_dim;
    require(params.n_kv_heads >= 1, "[", params.method, "] n_kv_heads: got ", params.n_kv_heads,
            ", wanted at least 1");
    const int least = params.sketch ? 0 : 1, most = kMaxScalarBits - (params.sketch ? 1 : 0);
    require(params.bits >= least && params.bits <= most, "[", params.method, "] bits: got ",
            params.bits + (params.sketch ? 1 : 0), ", wanted 1 to ", kMaxScalarBits);
    shape_.side = params.side;
    shape_.head_dim = dim;
    encoder_.dim = dim;
    encoder_.signs = rotation_.signs();
    encoder_.n_stages = shape_.n_planes = params.n_stages;
    encoder_.scale = params.scale;
    for (int s = 0; s < params.n_stages; ++s) {
      shape_.bits[s] = params.bits;
      const float* levels = params.bits == 0 ? nullptr
                            : s == 0         ? lloyd_max_levels(dim, params.bits)
                                             : lloyd_max_residual_levels(dim, params.bits);
      encoder_.stage[s] = scalar_quantizer(levels, params.bits);
    }
    if (params.sketch) {
      shape_.bits[shape_.n_planes++] = 1;
      shape_.n_scalars = 2;
      sketch_ = gaussian_sketch(dim, params.seed);
    }
  }

  std::string name() const override {
    std::string text = params_.method + " ";
    if (params_.sketch) return text + std::to_string(params_.bits) + "+1 bits prod";
    for (int s = 0; s < params_.n_stages; ++s) {
      text += (s ? "+" : "") + std::to_string(params_.bits);
    }
    text += params_.bits * params_.n_stages == 1 ? " bit" : " bits";
    if (params_.scale == ScalarScale::raw) text += " raw";
    if (params_.scale == ScalarScale::unbiased) text += " unbiased";
    return text;
  }
  Side side() const override { return params_.side; }
  int n_kv_heads() const override { return params_.n_kv_heads; }
  int head_dim() const override { return params_.head_dim; }
  int64_t block_bytes() const override { return shape_.block_bytes(); }
  int64_t token_bytes() const override { return shape_.token_bytes(); }
  int64_t scalar_bytes() const override { return 2 * shape_.n_scalars; }

  void encode_block(Backend backend, const BlockPlace&, const float* x, int n_tokens,
                    uint8_t* block) const override {
    const Kernels& kernels = kernels_of(backend);
    const int dim = params_.head_dim;
    const int64_t plane = int64_t{kBlockTokens} * dim;
    // Tokens that the block does not have are code 0, scalar 0.
    std::vector<uint8_t> codes(kMaxPlanes * plane, 0), turned;
    uint16_t scalars[kMaxScalars][kBlockTokens] = {};
    std::vector<float> left(params_.sketch ? plane : 0);
    kernels.encode_rows(encoder_, x, n_tokens, codes.data(), plane, scalars[0],
                        params_.sketch ? left.data() : nullptr);
    if (params_.sketch) {
      project(kernels, x, left.data(), n_tokens, codes.data() + plane, scalars[1]);
    }
    for (int p = 0; p < shape_.n_planes; ++p) {
      if (shape_.bits[p] == 0) continue;
      const uint8_t* source = codes.data() + p * plane;
      if (!shape_.by_token()) {
        turned.resize(plane);
        kernels.transpose_codes(source, kBlockTokens, dim, turned.data());
        source = turned.data();
      }
      kernels.pack_codes(source, plane, shape_.bits[p], block + shape_.plane_offset(p));
    }
    std::memcpy(block + shape_.scalar_offset(), scalars, 2 * kBlockTokens * shape_.n_scalars);
  }

  void decode_block(Backend backend, const BlockPlace&, const uint8_t* block, int n_tokens,
                    float* y, int64_t y_stride) const override {
    if (shape_.by_token()) {
      decode_rows(backend, block, n_tokens, y, y_stride);
    } else {
      std::vector<float> tile(int64_t{kBlockTokens} * params_.head_dim);
      decode_rows(backend, block, params_.head_dim, tile.data(), kBlockTokens);
      for (int t = 0; t < n_tokens; ++t) {
        for (int d = 0; d < params_.head_dim; ++d) {
          y[t * y_stride + d] = tile[d * kBlockTokens + t];
        }
      }
    }
    if (params_.sketch) {
      add_sketch(backend, block, n_tokens,
                 [&](int t, int d) -> float& { return y[t * y_stride + d]; });
    }
  }

  void decode_block_transposed(Backend backend, const BlockPlace&, const uint8_t* block,
                               int n_tokens, float* y_t) const override {
    const int dim = params_.head_dim;
    if (!shape_.by_token()) {
      decode_rows(backend, block, dim, y_t, kBlockTokens);
    } else {
      std::vector<float> tile(int64_t{kBlockTokens} * dim);
      decode_rows(backend, block, n_tokens, tile.data(), dim);
      for (int d = 0; d < dim; ++d) {
        for (int t = 0; t < n_tokens; ++t) y_t[d * kBlockTokens + t] = tile[t * dim + d];
      }
    }
    if (n_tokens < kBlockTokens) {
      for (int d = 0; d < dim; ++d) {
        std::fill(y_t + d * kBlockTokens + n_tokens, y_t + (d + 1) * kBlockTokens, 0.0f);
      }
    }
    if (params_.sketch) {
      add_sketch(backend, block, n_tokens,
                 [&](int t, int d) -> float& { return y_t[d * kBlockTokens + t]; });
    }
  }

  std::string code_kernel(Backend backend) const override {
    if (backend == Backend::reference) return {};
    return turboquant::code_kernel({shape_, &encoder_, sketch_.get()}, side());
  }
  std::unique_ptr<const CodeScores> code_scores(const BlockPlace&, const float* q,
                                                int n_rows) const override {
    return turboquant::code_scores({shape_, &encoder_, sketch_.get()}, q, n_rows);
  }
  std::unique_ptr<CodeSums> code_sums(const BlockPlace&, int n_rows) const override {
    return turboquant::code_sums({shape_, &encoder_, sketch_.get()}, n_rows);
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

  // A token: its planes one after the other, each a dense stream of whole bytes, then its scalars.
  void unpack_tokens(const uint8_t* block, int n_tokens, uint8_t* rows) const override {
    const Kernels& kernels = kernels_of(default_backend());
    const int dim = params_.head_dim;
    const int64_t plane = int64_t{kBlockTokens} * dim;
    std::vector<uint8_t> codes(plane), turned(plane), packed(plane);
    int64_t at = 0;
    for (int p = 0; p < shape_.n_planes; ++p) {
      const int64_t bytes = shape_.token_plane_bytes(p);
      if (bytes == 0) continue;
      const uint8_t* source = block + shape_.plane_offset(p);
      if (!shape_.by_token()) {
        kernels.unpack_codes(source, plane, shape_.bits[p], codes.data());
        kernels.transpose_codes(codes.data(), dim, kBlockTokens, turned.data());
        kernels.pack_codes(turned.data(), plane, shape_.bits[p], packed.data());
        source = packed.data();
      }
      for (int t = 0; t < n_tokens; ++t) {
        std::memcpy(rows + t * token_bytes() + at, source + t * bytes, bytes);
      }
      at += bytes;
    }
    for (int s = 0; s < shape_.n_scalars; ++s, at += 2) {
      const uint8_t* source = block + shape_.scalar_offset() + 2 * kBlockTokens * s;
      for (int t = 0; t < n_tokens; ++t) {
        std::memcpy(rows + t * token_bytes() + at, source + 2 * t, 2);
      }
    }
  }

  void pack_tokens(const uint8_t* rows, int n_tokens, uint8_t* block) const override {
    const Kernels& kernels = kernels_of(default_backend());
    const int dim = params_.head_dim;
    const int64_t plane = int64_t{kBlockTokens} * dim;
    std::vector<uint8_t> codes(plane), turned(plane), packed(plane);
    std::memset(block, 0, block_bytes());
    int64_t at = 0;
    for (int p = 0; p < shape_.n_planes; ++p) {
      const int64_t bytes = shape_.token_plane_bytes(p);
      if (bytes == 0) continue;
      uint8_t* target = block + shape_.plane_offset(p);
      uint8_t* tokens = shape_.by_token() ? target : packed.data();
      std::fill(packed.begin(), packed.end(), 0);
      for (int t = 0; t < n_tokens; ++t) {
        std::memcpy(tokens + t * bytes, rows + t * token_bytes() + at, bytes);
      }
      if (!shape_.by_token()) {
        kernels.unpack_codes(packed.data(), plane, shape_.bits[p], codes.data());
        kernels.transpose_codes(codes.data(), kBlockTokens, dim, turned.data());
        kernels.pack_codes(turned.data(), plane, shape_.bits[p], target);
      }
      at += bytes;
    }
    for (int s = 0; s < shape_.n_scalars; ++s, at += 2) {
      uint8_t* target = block + shape_.scalar_offset() + 2 * kBlockTokens * s;
      for (int t = 0; t < n_tokens; ++t) {
        std::memcpy(target + 2 * t, rows + t * token_bytes() + at, 2);
      }
    }
  }

 private:
  static int checked_dim(const ScalarCodecParams& params) {
    require(params.head_dim >= 8 && params.head_dim <= kMaxHeadDim && params.head_dim % 8 == 0, "[",
            params.method, "] head_dim: got ", params.head_dim, ", wanted a multiple of 8 up to ",
            kMaxHeadDim);
    return params.head_dim;
  }

  // The rows of the block, scaled by scalar 0: dimensions of keys, tokens of values.
  void decode_rows(Backend backend, const uint8_t* block, int n_rows, float* y,
                   int64_t y_stride) const {
    DecodeRowsArgs args{};
    for (int s = 0; s < params_.n_stages; ++s) {
      args.plane[s] = block + shape_.plane_offset(s);
      args.quantizer[s] = &encoder_.stage[s];
    }
    uint16_t scalars[kBlockTokens];
    std::memcpy(scalars, block + shape_.scalar_offset(), sizeof scalars);
    args.rows = n_rows;
    args.columns = shape_.columns();
    args.scalars = scalars;
    args.by_row = shape_.by_token();
    kernels_of(backend).decode_rows(args, y, y_stride);
  }

  // sign(S r) of what the stages left, and gamma = sqrt(pi / 2) / D |r| in the token's units.
  void project(const Kernels& kernels, const float* x, const float* left, int n_tokens,
               uint8_t* signs, uint16_t* scalars) const {
    const int dim = params_.head_dim;
    const float root_dim = std::sqrt(static_cast<float>(dim));
    std::vector<float> projected(dim);
    for (int t = 0; t < n_tokens; ++t) {
      const float* row = x + t * dim;
      const float* rest = left + t * dim;
      kernels.row_times_matrix(rest, sketch_->columns.data(), dim, projected.data());
      for (int d = 0; d < dim; ++d) signs[t * dim + d] = projected[d] >= 0.0f ? 1 : 0;
      const float norm = std::sqrt(dot_row(row, row, dim));
      const float size = std::sqrt(dot_row(rest, rest, dim));  // in units of |k| / sqrt(D)
      const float factor = mul(norm, mul(size, kSketchFactor));
      scalars[t] = stored_scalar(factor, mul(root_dim, static_cast<float>(dim)));
    }
  }

  // y += gamma S^T sign
  template <class Element>
  void add_sketch(Backend backend, const uint8_t* block, int n_tokens, Element element) const {
    const Kernels& kernels = kernels_of(backend);
    const int dim = params_.head_dim, last = shape_.n_planes - 1;
    const int64_t plane = int64_t{kBlockTokens} * dim;
    std::vector<uint8_t> codes(plane);
    std::vector<float> signs(dim), sum(dim);
    kernels.unpack_codes(block + shape_.plane_offset(last), plane, 1, codes.data());
    const uint8_t* gammas = block + shape_.scalar_offset() + 2 * kBlockTokens;
    for (int t = 0; t < n_tokens; ++t) {
      for (int d = 0; d < dim; ++d) {
        const uint8_t code = shape_.by_token() ? codes[t * dim + d] : codes[d * kBlockTokens + t];
        signs[d] = code ? 1.0f : -1.0f;
      }
      kernels.row_times_matrix(signs.data(), sketch_->rows.data(), dim, sum.data());
      uint16_t half;
      std::memcpy(&half, gammas + 2 * t, 2);
      const float gamma = f16_to_f32(half);
      for (int d = 0; d < dim; ++d) {
        float& y = element(t, d);
        y = y + mul(gamma, sum[d]);
      }
    }
  }

  ScalarCodecParams params_;
  Rotation rotation_;
  BlockShape shape_;
  RowEncoder encoder_;
  std::shared_ptr<const Sketch> sketch_;
};

}  // namespace

CodecPtr make_scalar_codec(const ScalarCodecParams& params) {
  return std::make_shared<ScalarCodec>(params);
}

}  // namespace turboquant

CodecPtr make_turboquant_codec(Side side, int n_kv_heads, int head_dim,
                               const TurboQuantOptions& options) {
  require(!options.prod || options.scale == ScalarScale::raw,
          "[turboquant] scale: got another one with prod, wanted 'raw' (its second stage makes "
          "inner products unbiased)");
  turboquant::ScalarCodecParams params{"turboquant", side, n_kv_heads, head_dim};
  params.bits = options.prod ? options.bits - 1 : options.bits;
  params.sketch = options.prod;
  params.scale = options.scale;
  params.seed = options.seed;
  return turboquant::make_scalar_codec(params);
}

CodecPtr turboquant_from_spec(const CodecSpec& spec, const CodecTables& tables) {
  SpecReader reader(spec, tables);
  TurboQuantOptions options;
  options.bits = static_cast<int>(reader.integer("bits", 1, kMaxScalarBits));
  options.prod = reader.integer_or("prod", 0, 0, 1) == 1;
  options.scale =
      options.prod && !reader.has("scale")
          ? ScalarScale::raw
          : static_cast<ScalarScale>(reader.choice("scale", {"norm_corrected", "raw", "unbiased"}));
  options.seed = static_cast<uint64_t>(reader.integer_or("seed", 0, 0, INT64_MAX));
  reader.finish();
  return make_turboquant_codec(spec.side, spec.n_kv_heads, spec.head_dim, options);
}

}  // namespace veloxquant
